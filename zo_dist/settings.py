"""From YAML and `section.key=value` overrides to dataclasses: every key known, every value of its type.

YAML 1.1 reads `1e-6` as a string and lets a repeated key win silently; here the first is a number
and the second an error.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's floats and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError for a missing file, bad YAML, or another content."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no config file {str(path)!r} (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config file {str(path)!r}: {error}") from error
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}; a config is a mapping of sections")
    return content


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` (value in YAML) in `settings`; a later override wins."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        *sections, last = key.strip().split(".")
        place = settings
        for i, name in enumerate(sections):
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                where = ".".join(sections[: i + 1])
                raise ValueError(f"override {override!r}: {where} is {place!r}, which has no keys inside")
        place[last] = _parse(text, f"override {override!r}")


def _parse(text: str, where: str) -> Any:
    try:
        # A subclass of SafeLoader, which builds plain values only.
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error


def build(cls: type[T], settings: Mapping[str, Any], prefix: str = "") -> T:
    """An instance of the dataclass `cls`; `prefix` is where `settings` stands, for the messages.

    ValueError for an unknown or missing key, a value of a wrong type, or one that `cls` refuses.
    """
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key}; {nearest(str(key), known)}")
    values = {}
    for name, field in known.items():
        if name in settings:
            values[name] = _convert(hints[name], settings[name], prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            if not is_dataclass(hints[name]):
                raise ValueError(f"{prefix}{name} is missing; give {_describe(hints[name])}")
            values[name] = build(hints[name], {}, f"{prefix}{name}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}" if prefix else str(error)) from error


def nearest(name: str, known: Collection[str]) -> str:
    """What to say of a name that is none of `known`: the nearest of them, or all."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    variants = [option for option in options if is_dataclass(option)]
    if variants:
        if not isinstance(value, dict):
            raise ValueError(f"{key} is {value!r}; it is a section with keys of its own")
        return build(_variant(variants, value, key), value, f"{key}.")
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ValueError(f"{key} is an integer of {len(str(value))} digits; too large") from None
        if option in (bool, int, str) and type(value) is option:
            return value
    raise ValueError(f"{key} is {value!r}, of type {type(value).__name__}; legal: {_describe(hint)}")


def _variant(variants: Sequence[Any], value: Mapping[str, Any], key: str) -> Any:
    """Which of several dataclasses is meant: the one whose `name` has the given value."""
    if len(variants) == 1:
        return variants[0]
    by_name = {get_args(get_type_hints(v)["name"])[0]: v for v in variants}
    name = value.get("name")
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(f"{key}.name is {name!r}; legal: {', '.join(by_name)}")
    return by_name[name]


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
