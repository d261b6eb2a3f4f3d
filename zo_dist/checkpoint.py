"""Save the weights of a sharded model as the files that `from_pretrained` loads, and their checksums."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zo_dist.engines import Engine
from zo_dist.files import fault_of, naming, read_checked, sync_and_check, write_checked
from zo_dist.params import Owner, Param, canonical_name

CHECKSUMS = "checksums.json"

# The largest file of a saved model, unless a single weight is larger.
MAX_SHARD = "2GB"


def save_model(engine: Engine, path: str | Path, tokenizer: Any = None) -> None:
    """Write the whole model to the folder `path`, replacing what is there. Every rank must call it.

    A model with `save_pretrained` (transformers; PEFT, which saves its adapter alone) is saved by
    it, in files of at most MAX_SHARD; any other module as `model.safetensors`. Weights keep their dtype and
    bits; frozen weights and persistent buffers are included. The folder appears, complete, by a rename, with
    the size and CRC-32C of each file in `checksums.json`. Raises on every rank if the write fails.

    Each weight is gathered by itself and put by rank 0 into a file beside `path` that is mapped into memory.
    So what rank 0 holds besides, whatever the model's size, is one weight (and one file of the saved model,
    with a safetensors that copies what it writes). Cost: each byte written twice, and disk space for the
    model twice while it is saved.
    """
    path = require_replaceable(path)
    with gathered(engine, path) as state, engine.jointly():
        if engine.rank == 0:
            _write(engine.module, state, path, tokenizer)


def require_replaceable(path: str | Path) -> Path:
    """The absolute path. ValueError for what must not be replaced.

    That is: the folder that this process works in or one around it, a mount point, and whatever has files
    and is no model that `save_model` wrote.
    """
    whole = Path(path).expanduser().absolute()
    reason = None
    if whole.resolve() in (Path.cwd(), *Path.cwd().parents):
        reason = "this process works in it"
    elif whole.is_mount():
        reason = "it is a mount point"
    elif whole.exists() and not (whole / CHECKSUMS).exists() and (whole.is_file() or any(whole.iterdir())):
        reason = f"it holds something else than a model saved by zo_dist (there is no {CHECKSUMS})"
    if reason is not None:
        raise ValueError(
            f"the model cannot be saved as {str(path)!r}: what is there is replaced by a rename, and {reason}"
            "; name a folder that does not exist, such as one inside"
        )
    return whole


@contextmanager
def gathered(engine: Engine, path: Path) -> Iterator[dict[str, Tensor]]:
    """Inside, `gather_state` of the whole model, in files beside `path`. Every rank must enter."""
    path = path.absolute()
    folder = path.with_name(f".{path.name}.gathered")
    with ExitStack() as stack:
        with engine.jointly():
            if engine.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                # What an earlier process was killed over, too.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield gather_state(engine, folder)


def check_model(path: Path) -> list[str]:
    """Read every file that `save_model` wrote; returns their names. ValueError if one is not as it was."""
    try:
        files = read_checked(path / CHECKSUMS)
    except OSError as error:
        raise ValueError(f"{path / CHECKSUMS} cannot be read: {error.strerror}; {_remedy(path)}") from error
    except ValueError as error:
        raise ValueError(f"{error}; {_remedy(path)}") from error
    for name, expected in files.items():
        fault = fault_of(path / name, expected)
        if fault:
            raise ValueError(f"{path / name} {fault}; {_remedy(path)}")
    return list(files)


def _remedy(path: Path) -> str:
    return f"delete {path}: zo-dist export rebuilds a run's model, after any step, from its log"


@torch.no_grad()
def gather_state(engine: Engine, folder: Path) -> dict[str, Tensor]:
    """The state dict, by canonical names, on rank 0, mapped from files in `folder`; empty on the others.

    A tied weight is one tensor under each of its names. Raises on every rank if the disk is full.
    """
    # Whatever a forward left gathered is released, so that the parameters found are the shards.
    engine.publish()
    state: dict[str, Tensor] = {}
    gathered: dict[nn.Parameter, Tensor] = {}
    error: Exception | None = None

    def kept(tensor: Tensor) -> Tensor:
        nonlocal error
        if engine.rank == 0 and error is None:
            try:
                return _mapped(tensor, folder / str(len(state)))
            except (OSError, RuntimeError) as caught:  # torch's, of a mapping, is no OSError
                # The others gather on: they are told when all is over.
                error = caught
        return torch.empty(0)

    for prefix, owner in engine.module.named_modules(remove_duplicate=False):
        for attribute, param in list(owner._parameters.items()):
            if param is None:
                continue
            name = canonical_name(f"{prefix}.{attribute}".lstrip("."))
            if param not in gathered:
                at = Owner(owner, owner, attribute)
                with engine.whole(Param(name, param, engine.shape_of(param), (at,))) as whole:
                    gathered[param] = kept(whole)
            state[name] = gathered[param]
        for attribute, buffer in owner._buffers.items():
            if buffer is not None and attribute not in owner._non_persistent_buffers_set:
                state[canonical_name(f"{prefix}.{attribute}".lstrip("."))] = kept(buffer)
    engine.together(error)
    return state if engine.rank == 0 else {}


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    """A copy of `tensor` whose memory is a new file."""
    if not tensor.numel():
        return tensor.detach().to("cpu", copy=True)
    with naming(path), path.open("xb") as file:
        # The space is taken now: a full disk is an error here, a signal that kills where memory is written.
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
    mapped = torch.from_file(str(path), shared=True, size=tensor.nbytes, dtype=torch.uint8)
    return mapped.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _write(module: nn.Module, state: dict[str, Tensor], path: Path, tokenizer: Any) -> None:
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    save_pretrained: Any = getattr(module, "save_pretrained", None)
    if save_pretrained is not None:
        with _whole_to_transformers(module):
            save_pretrained(partial, state_dict=state, max_shard_size=MAX_SHARD)
    else:
        # safetensors refuses shared memory: a tied weight is stored under its first name.
        first = {id(tensor): name for name, tensor in reversed(state.items())}
        unique = {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}
        save_file(unique, partial / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    write_checked(partial / CHECKSUMS, {name: sync_and_check(partial / name) for name in names})
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _whole_to_transformers(module: nn.Module) -> Iterator[None]:
    """Inside, a model that transformers sharded is saved from what it is given, by this rank alone.

    Else it gathers once more, and waits for ranks that do not come.
    """
    config = getattr(module, "config", None)
    sharded = getattr(config, "distributed_config", None)
    if config is None or sharded is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = sharded
