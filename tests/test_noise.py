"""The generator against its published vectors and a scalar twin, and z as a function of its address."""

from __future__ import annotations

import itertools
import math
import platform
import random
from pathlib import Path
from unittest import mock

import pytest
import table
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import philox4x32, rademacher, round_to, rounding_bits

from zo_dist import generator, kernels, native
from zo_dist.generator import philox
from zo_dist.noise import Noise

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def in_torch(counter: list[int], key: list[int]) -> list[int]:
    weyl = (0x9E3779B9, 0xBB67AE85)
    schedule = [(key[i] + r * weyl[i]) & 0xFFFFFFFF for r in range(10) for i in (0, 1)]
    tensors = [torch.tensor([c]) for c in counter]
    return [int(x) for x in philox(tuple(tensors), torch.tensor(schedule))]  # type: ignore[arg-type]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    assert in_torch(words_of(counter), words_of(key)) == words_of(result)
    assert list(philox4x32(words_of(counter), words_of(key))) == words_of(result)


def test_philox_equals_a_scalar_twin() -> None:
    rng = random.Random(0)
    for _ in range(50):
        counter, key = [rng.getrandbits(32) for _ in range(4)], [rng.getrandbits(32) for _ in range(2)]
        assert in_torch(counter, key) == list(philox4x32(counter, key))


@pytest.mark.parametrize(
    ("name", "step", "direction", "offset"),
    [("a.weight", 0, 0, 0), ("b", 3, 7, 100), ("b", 2**31 - 2, 2**20, 128 * 2**33 + 5)],
)
def test_rademacher_values_follow_from_the_words(name: str, step: int, direction: int, offset: int) -> None:
    z = Noise("rademacher", 9).values(name, step, direction, offset, 200)
    assert z.tolist() == [rademacher(9, name, step, direction, offset + i) for i in range(200)]


# Any way of cutting


@settings(max_examples=25, deadline=None)
@given(
    law=st.sampled_from(table.LAWS),
    offset=st.integers(0, 300),
    cuts=st.lists(st.integers(0, 700), max_size=5),
    chunk=st.sampled_from([512, 1024, 1 << 20]),
)
def test_any_split_into_spans_and_chunks_gives_the_same_bits(
    law: str, offset: int, cuts: list[int], chunk: int
) -> None:
    function = Noise(law, 5)  # type: ignore[arg-type]
    whole = function.values("w", 2, 1, 0, 1000)
    weight = torch.linspace(-1, 1, 700)
    edges = sorted({0, *cuts, 700})
    before = kernels.EAGER_CHUNK
    kernels.EAGER_CHUNK = chunk
    try:
        z, shifted = torch.zeros(700), weight.clone()
        rounded = torch.zeros(700, dtype=torch.bfloat16)
        for a, b in itertools.pairwise(edges):
            function.accumulate(z[a:b], "w", 2, [(1, 1.0)], offset + a)
            function.shift([shifted[a:b]], weight[a:b], "w", 2, 1, offset + a, [0.125])
            function.round(rounded[a:b], weight[a:b], "w", 2, offset + a)
    finally:
        kernels.EAGER_CHUNK = before
    assert torch.equal(z, whole[offset : offset + 700])
    assert torch.equal(shifted, weight + 0.125 * z)
    uncut, padded = torch.zeros(1000, dtype=torch.bfloat16), torch.zeros(1000)
    padded[offset : offset + 700] = weight
    function.round(uncut, padded, "w", 2, 0)
    assert torch.equal(rounded, uncut[offset : offset + 700])


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_shift_is_rounded_once(law: str, dtype: torch.dtype) -> None:
    function = Noise(law, 1)  # type: ignore[arg-type]
    weight = torch.linspace(-2, 2, 500).to(dtype)
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    function.shift([plus, minus], weight, "w", 0, 0, 3, [1e-3, -1e-3])
    change = function.values("w", 0, 0, 3, 500) * torch.tensor(1e-3)
    assert torch.equal(plus, (weight.float() + change).to(dtype))
    assert torch.equal(minus, (weight.float() - change).to(dtype))


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("width", [1, 96, 128, 700])
def test_rows_that_are_looked_up_are_shifted_as_in_the_whole(law: str, width: int) -> None:
    function = Noise(law, 1)  # type: ignore[arg-type]
    weight = torch.linspace(-2, 2, 50 * width).bfloat16()
    whole = torch.empty_like(weight)
    function.shift([whole], weight, "w", 4, 1, 0, [-0.1])
    rows = torch.tensor([7, 0, 49, 7, 12])
    looked_up = function.shift_rows(weight.view(50, width), rows, "w", 4, 1, -0.1)
    assert torch.equal(looked_up, whole.view(50, width)[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_follows_from_the_words(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 12, (2000,), generator=generator)
    exact = torch.randn(2000, generator=generator) * 2.0**exponents
    out = torch.empty(2000, dtype=dtype)
    Noise("rademacher", 8).round(out, exact, "w", 3, 77)
    bits = rounding_bits(8, "w", 3, 77, 2000)
    assert out.tolist() == [round_to(x, b, dtype) for x, b in zip(exact.tolist(), bits, strict=True)]


def _difference(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.float32) - total


def uses(function: Noise, dtype: torch.dtype, size: int, offset: int) -> list[torch.Tensor]:
    """What each use of noise makes of the same tensors."""
    z, weight = torch.full((size,), 0.5), torch.linspace(-1, 1, size).to(dtype)
    function.accumulate(z, "w", 1, [(2, 0.3)], offset)
    shifted, plus, minus, rounded, small = (torch.zeros_like(weight) for _ in range(5))
    function.shift([shifted], weight, "w", 1, 2, offset, [1e-2])
    function.shift([plus, minus], weight, "w", 1, 2, offset, [1e-2, -1e-2])
    if dtype != torch.float32:
        function.round(rounded, z / 3, "w", 1, offset)
        function.round(small, z * 1e-5, "w", 1, offset)
    counts = (1, 2, 5)  # one direction, some of a group, more than a group
    sums = [torch.empty_like(z) for _ in counts]
    for count, out in zip(counts, sums, strict=True):
        terms = [(d, 0.3 + d) for d in range(count)]
        function.combine(out, [weight], "w", 1, terms, offset, _difference, ())
    return [z, shifted, plus, minus, rounded, small, *sums]


@settings(max_examples=20, deadline=None)
@given(
    law=st.sampled_from(table.LAWS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.integers(0, 9000),
    offset=st.integers(0, 5000) | st.integers(0, 2**44),
)
def test_native_and_eager_forms_give_the_same_bits(
    law: str, dtype: torch.dtype, size: int, offset: int
) -> None:
    made = []
    for form in ("eager", "native"):
        with table.noise_in(form, law, 3) as function:
            made.append(uses(function, dtype, size, offset))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is of x86")
def test_native_code_without_avx512_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -mno-avx512f\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("ZO_DIST_CACHE", str(tmp_path))
    wide = native.library()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        narrow = native.library.__wrapped__()
    assert wide is not None
    assert narrow is not None
    assert narrow._name != wide._name
    for law, dtype in itertools.product(table.LAWS, (torch.float32, torch.bfloat16, torch.float16)):
        for size, offset in ((9000, 13), (2048, 2**33)):
            made = []
            for library in (wide, narrow):
                with mock.patch.object(native, "library", return_value=library):
                    made.append(uses(Noise(law, 3, compile=True), dtype, size, offset))  # type: ignore[arg-type]
            for a, b in zip(*made, strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("law", table.LAWS)
def test_all_forms_give_the_same_bits(law: str) -> None:
    for size, offset in ((1, 0), (576, 0), (4096, 13), (50_077, 0), (50_077, 13)):
        made = {}
        for form in table.FORMS:
            with table.noise_in(form, law, 3) as function:
                made[form] = uses(function, torch.bfloat16, size, offset)
        for form in table.FORMS[1:]:
            for a, b in zip(made["eager"], made[form], strict=True):
                assert torch.equal(a, b), form


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_cpu() -> None:
    function = Noise("rademacher", 3)
    here, there = torch.zeros(10_000), torch.zeros(10_000, device="cuda")
    function.accumulate(here, "w", 1, [(2, 0.3)], 5)
    function.accumulate(there, "w", 1, [(2, 0.3)], 5)
    assert torch.equal(here, there.cpu())


# Statistics. Every bound below is 5 standard deviations of what is measured, at fixed seeds: an
# honest generator fails one such check in 1.7 million.
SAMPLE = 1 << 18
SIGMAS = 5.0


@pytest.mark.parametrize(("law", "fourth"), [("rademacher", 1.0), ("gaussian", 3.0)])
def test_moments(law: str, fourth: float) -> None:
    z = Noise(law, 11).values("w", 0, 0, 0, SAMPLE).double()  # type: ignore[arg-type]
    root = math.sqrt(SAMPLE)
    # Variances of z, z^2, z^3, z^4 of a normal: 1, 2, 15, 96. Of a sign: 1, 0, 1, 0.
    spread = (1.0, 0.0, 1.0, 0.0) if law == "rademacher" else (1.0, 2.0, 15.0, 96.0)
    for power, (mean, variance) in enumerate(zip((0.0, 1.0, 0.0, fourth), spread, strict=True), start=1):
        error = abs(float((z**power).mean()) - mean)
        # 1e-6: values are float32 and 24-bit uniforms stand for reals.
        assert error <= SIGMAS * math.sqrt(variance) / root + 1e-6, power


def test_gaussian_follows_the_normal_distribution() -> None:
    z = Noise("gaussian", 12).values("w", 0, 0, 0, SAMPLE).double().sort().values
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    steps = torch.arange(1, SAMPLE + 1).double() / SAMPLE
    # Kolmogorov-Smirnov: P(sqrt(n) D > 2.7) = 2 exp(-2 * 2.7^2) = 9e-7.
    assert float((cdf - steps).abs().max()) * math.sqrt(SAMPLE) < 2.7


@pytest.mark.parametrize("law", table.LAWS)
def test_no_two_uses_are_correlated(law: str) -> None:
    size = 1 << 14
    a, b = Noise(law, 1), Noise(law, 2)  # type: ignore[arg-type]
    draws = {
        "base": a.values("layers.1.weight", 4, 2, 0, size),
        "seed": b.values("layers.1.weight", 4, 2, 0, size),
        "step": a.values("layers.1.weight", 5, 2, 0, size),
        "direction": a.values("layers.1.weight", 4, 3, 0, size),
        "step and direction swapped": a.values("layers.1.weight", 2, 4, 0, size),
        "name": a.values("layers.2.weight", 4, 2, 0, size),
        "next element": a.values("layers.1.weight", 4, 2, 1, size),
        "next word": a.values("layers.1.weight", 4, 2, 32, size),
        "next block": a.values("layers.1.weight", 4, 2, 4 if law == "gaussian" else 128, size),
    }
    for (one, x), (two, y) in itertools.combinations(draws.items(), 2):
        # The mean of products of independent variables of variance 1 has deviation size^-1/2.
        assert abs(float((x * y).double().mean())) < SIGMAS / math.sqrt(size), (one, two)


def test_roundings_are_even_and_apart_from_z_and_from_each_other() -> None:
    """A value half way between two neighbours goes up by the top bit of its 16."""
    function = Noise("rademacher", 4)
    half_way, rounded = torch.full((SAMPLE,), 1 + 2.0**-8), torch.zeros(SAMPLE, dtype=torch.bfloat16)
    function.round(rounded, half_way, "w", 0, 0)
    ups = (rounded.float() - half_way) * 2.0**8
    assert set(ups.tolist()) == {-1.0, 1.0}
    bound = SIGMAS / math.sqrt(SAMPLE)
    assert abs(float(ups.mean())) < bound
    assert abs(float((ups * function.values("w", 0, 0, 0, SAMPLE)).mean())) < bound
    # Those that share a word are a multiple of 32 apart.
    for distance in (1, 2, 16, *range(32, 1024, 32), 1024):
        assert abs(float((ups[distance:] * ups[:-distance]).mean())) < 2 * bound, distance


def test_uniforms_are_uniform() -> None:
    function = Noise("rademacher", 4)
    uniforms = torch.tensor(function.uniforms("s", 0, 0, 4096), dtype=torch.float64)
    assert 0.0 <= float(uniforms.min()) < float(uniforms.max()) < 1.0
    assert abs(float(uniforms.mean()) - 0.5) < SIGMAS * math.sqrt(1 / 12 / 4096)
    assert function.uniforms("s", 0, 0, 3) == uniforms[:3].tolist()


def test_no_two_draws_share_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every (key, counter) that the generator is asked for, over uses, steps, directions and names."""
    seen: list[tuple[int, ...]] = []

    def record(counter: tuple[torch.Tensor, ...], schedule: torch.Tensor) -> tuple[torch.Tensor, ...]:
        blocks = zip(*(c.flatten().tolist() for c in torch.broadcast_tensors(*counter)), strict=True)
        seen.extend((*words, *schedule[:2].flatten().tolist()) for words in blocks)
        return philox(counter, schedule)  # type: ignore[arg-type]

    monkeypatch.setattr(generator, "philox", record)
    function = Noise("rademacher", 7)
    for name, step, direction in itertools.product(("a", "b"), (0, 1, 2**31), (0, 1, 255)):
        function.values(name, step, direction, 0, 1280)
        function.uniforms(name, step, direction, 8)
    for name, step in itertools.product(("a", "b"), (0, 1, 2**31)):
        function.round(torch.zeros(1024, dtype=torch.bfloat16), torch.zeros(1024), name, step, 0)
    assert len(seen) > 200
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "uniform"}, "rademacher, gaussian"),
        ({"seed": -1}, "out of range"),
        ({"seed": 2**63}, "out of range"),
        ({"seed": 1.5}, "out of range"),
    ],
)
def test_bad_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**options)  # type: ignore[arg-type]
