"""native.cpp, compiled for this processor when it is first used, and called on flat CPU tensors.

Compiling takes the C++ compiler (`$CXX`, else `c++`) some 2 seconds; what it makes is kept in the
cache folder, by processor, compiler and source. Where that fails, `library` says so once and noise goes
through `torch.compile`, as on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from zo_dist.cache import default_cache

_SOURCE = Path(__file__).with_suffix(".cpp")
# Contracted multiplications and additions would have other bits than torch has. The last two let
# the compiler vectorise choices and square roots; nobody reads errno or traps here.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LAWS = {"rademacher": 0, "gaussian": 1}

log = logging.getLogger(__name__)


class Address(Structure):
    """Where random bits come from: the key of a parameter, the step, and `stream << 24 | direction`."""

    _fields_ = (("key0", c_uint32), ("key1", c_uint32), ("step", c_uint32), ("word", c_uint32))


# Arguments as in native.cpp.
_ADDRESS, _FLOATS, _WORDS = POINTER(Address), POINTER(c_float), POINTER(c_uint32)
_FUNCTIONS = {
    "zo_shift": (c_int, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_uint64, _ADDRESS, _FLOATS, c_int),
    "zo_accumulate": (c_int, c_void_p, c_int64, c_uint64, _ADDRESS, _WORDS, _FLOATS, c_int, c_int),
    "zo_round": (c_int, c_void_p, c_void_p, c_int64, c_uint64, _ADDRESS, c_int),
    "zo_update": (
        *(c_int, c_int, c_void_p, c_void_p, c_int64, c_uint64, _ADDRESS, _WORDS, _FLOATS, c_int),
        *(c_int, c_uint32, c_float, c_float, c_int),
    ),
    "zo_moment_sums": (c_int, c_void_p, c_int64, POINTER(c_int64), c_int),
    "zo_fingerprint": (c_int, c_void_p, c_int64, c_uint64, c_int),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, where they cannot be compiled."""
    try:
        found = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("noise goes through torch.compile: %s could not be used (%s)", _SOURCE.name, reason)
        return None
    for name, arguments in _FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.zo_fingerprint.restype = c_uint64
    return found


def _built() -> Path:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, *_FLAGS]
    if platform.machine() in ("x86_64", "AMD64"):
        # Left alone, compilers use half of what a processor with AVX-512 has.
        command.append("-mprefer-vector-width=512")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_of = hashlib.sha256("\0".join([*command, version, _processor()]).encode() + _SOURCE.read_bytes())
    folder = default_cache()
    final = folder / f"native-{made_of.hexdigest()[:16]}.so"
    if final.is_file():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    # Made beside it and renamed, so any number of processes may do this at once or be killed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".native-") as scratch:
        out = Path(scratch) / final.name
        subprocess.run(
            [*command, str(_SOURCE), "-o", str(out)], capture_output=True, text=True, check=True, timeout=300
        )
        out.replace(final)
    return final


def _processor() -> str:
    """What tells processors apart that `-march=native` compiles differently for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    kinds = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _functions() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask library() first"
    return found


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def _terms(address: Address, terms: Sequence[tuple[int, float]]) -> tuple[object, object, int]:
    """The counter words and scales of `(direction, scale)`, and how many."""
    words = [address.word | direction for direction, _ in terms]
    return (c_uint32 * len(terms))(*words), (c_float * len(terms))(*(s for _, s in terms)), len(terms)


def shift(
    outs: Sequence[Tensor], weight: Tensor, law: str, address: Address, offset: int, scales: Sequence[float]
) -> None:
    """`Noise.shift`."""
    assert all(out.dtype == weight.dtype for out in outs)
    plus, minus = _pointer(outs[0]), _pointer(outs[1]) if len(outs) == 2 else None
    kind, factors = (_DTYPES[weight.dtype], _LAWS[law]), (c_float * len(outs))(*scales)
    place = plus, minus, _pointer(weight), weight.numel(), offset, address
    _functions().zo_shift(*kind, *place, factors, torch.get_num_threads())


def accumulate(
    out: Tensor, law: str, address: Address, offset: int, terms: Sequence[tuple[int, float]]
) -> None:
    """`Noise.accumulate`; the address is that of direction 0."""
    assert out.dtype == torch.float32
    place = _pointer(out), out.numel(), offset, address
    _functions().zo_accumulate(_LAWS[law], *place, *_terms(address, terms), torch.get_num_threads())


def round(out: Tensor, exact: Tensor, address: Address, offset: int) -> None:
    """`Noise.round`."""
    assert exact.dtype == torch.float32
    place = _pointer(out), _pointer(exact), out.numel(), offset, address
    _functions().zo_round(_DTYPES[out.dtype], *place, torch.get_num_threads())


def update(
    weight: Tensor,
    lost: Tensor | None,
    law: str,
    address: Address,
    offset: int,
    terms: Sequence[tuple[int, float]],
    rounding: Address | None,
    keep: float,
    lr: float,
) -> None:
    """`weight = round(keep * (weight + lost) - lr * total)`: the rule `SGD`, and the rounding of it.

    `rounding`: the address of the bits to round by; None rounds to nearest, and keeps in `lost`, if that
    is given, what was lost.
    """
    kind = _DTYPES[weight.dtype], _LAWS[law]
    place = _pointer(weight), None if lost is None else _pointer(lost), weight.numel(), offset, address
    word = 0 if rounding is None else rounding.word
    how = rounding is not None, word, keep, lr, torch.get_num_threads()
    _functions().zo_update(*kind, *place, *_terms(address, terms), *how)


def moment_sums(weight: Tensor) -> tuple[int, int]:
    """`agreement.moment_sums`, of a piece that cannot overflow."""
    sums = (c_int64 * 2)()
    place = _DTYPES[weight.dtype], _pointer(weight), weight.numel(), sums
    _functions().zo_moment_sums(*place, torch.get_num_threads())
    return sums[0], sums[1]


def fingerprint(words: Tensor, offset: int) -> int:
    """`agreement.fingerprint` of integers."""
    kind = words.element_size(), _pointer(words), words.numel(), offset
    return int(_functions().zo_fingerprint(*kind, torch.get_num_threads()))
