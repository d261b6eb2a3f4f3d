"""Noise and rounding on some columns of a matrix are those columns of what the whole matrix gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import table
import torch
from torch import Tensor

from zo_dist import runs as module
from zo_dist.noise import Noise
from zo_dist.params import Runs
from zo_dist.runs import in_runs

# Rows, columns, first column, columns held: short and long runs, of numbers that fit no tile.
SHAPES = [(70, 260, 51, 130), (5, 20000, 3001, 9000)]
# Where the tensor of a call begins and ends in the piece, as a share of it.
PARTS = [(0.0, 1.0), (0.0, 0.37), (0.37, 0.9)]


# That torch.compile has the bits of these is in test_noise.py.
@pytest.mark.parametrize("form", ["eager", "native"])
@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize(("rows", "columns", "first", "width"), SHAPES)
def test_some_columns_get_what_they_get_in_the_whole(
    monkeypatch: pytest.MonkeyPatch, form: str, law: str, rows: int, columns: int, first: int, width: int
) -> None:
    # So that a piece takes several turns.
    monkeypatch.setattr(module, "_CPU_ROWS", 16 * 260 if columns == 260 else module._CPU_ROWS)
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.bfloat16)
    exact = torch.randn(rows, columns)
    runs, terms = Runs(width, columns), [(0, 0.5), (3, -1.25)]

    def held(whole: Tensor) -> Tensor:
        return whole[:, first : first + width].reshape(-1).clone()

    with table.noise_in(form, law, 7) as noise:
        for start, stop in ((int(a * rows * width), int(b * rows * width)) for a, b in PARTS):
            part, mine = slice(start, stop), in_runs(noise, first, runs)
            at = first + start

            def same(
                outs: list[Tensor],
                act: Callable[[Noise, list[Tensor], Callable[[Tensor], Tensor], int], None],
                part: slice = part,
                mine: Noise = mine,
                at: int = at,
            ) -> None:
                """`act` on the whole, and on this part of the piece."""
                pieces = [held(out)[part] for out in outs]
                act(noise, [out.view(-1) for out in outs], lambda t: t.reshape(-1), 0)
                act(mine, pieces, lambda t: held(t)[part], at)
                for out, piece in zip(outs, pieces, strict=True):
                    assert torch.equal(piece, held(out)[part])

            plus, minus = torch.zeros_like(weight), torch.zeros_like(weight)
            same([plus, minus], lambda n, o, of, i: n.shift(o, of(weight), "w", 3, 1, i, [0.01, -0.01]))
            assert not torch.equal(plus, weight)
            same([exact.clone()], lambda n, o, of, i: n.accumulate(o[0], "w", 3, terms, i))
            same([torch.zeros_like(weight)], lambda n, o, of, i: n.round(o[0], of(exact), "w", 3, i))


def test_a_piece_that_is_one_run_is_left_to_the_noise_itself() -> None:
    noise = Noise()
    assert in_runs(noise, 5, None) is noise
