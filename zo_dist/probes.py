"""One step's probes: which rows test which direction, and their summed losses.

The D directions are cut into groups of k (`directions_per_row`), and the R rows of all ranks and
micro-batches into as many groups: row r tests the k directions of group floor(r * D / k / R). Each side
of a direction (+ and - for `TwoSided`) is one probe on these rows; the unshifted side is one for the k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zo_dist.composite import Composite
from zo_dist.engines import Engine
from zo_dist.engines.agreement import digest, fingerprint
from zo_dist.estimators import Estimator
from zo_dist.params import Param
from zo_dist.parts import Probe
from zo_dist.perturb import ModulePerturbation, ShardPerturbation

Batch = Mapping[str, Any]
# One loss per row, or the pair (sums per row, weights per row) for means over tokens.
RowLoss = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Tensor]]
# A mean loss, or the pair (sum, weight).
Closure = Callable[[], Tensor | tuple[Tensor, Tensor | float]]


def num_rows(batch: Batch) -> int:
    """The rows of a batch: dim 0 of its tensors, which agree or are 1 (unbatched inputs).

    Raises ValueError when they do not agree or there is no tensor.
    """
    sizes = {key: t.shape[0] for key, t in batch.items() if isinstance(t, Tensor) and t.ndim}
    if not sizes:
        raise ValueError(f"the batch holds no tensor with rows along dim 0; its keys: {list(batch)}")
    rows = max(sizes.values()) if min(sizes.values()) else 0
    if any(size not in (1, rows) for size in sizes.values()):
        raise ValueError(f"the batch's tensors disagree on the number of rows (dim 0): {sizes}")
    return rows


# What a record of the log counts (trajectory.py).
MOST_DIRECTIONS = 65_535


def require_groups(directions: int, per_row: int, name: str = "directions") -> None:
    """ValueError unless the directions of a step can be cut into groups of `per_row`."""
    if not 1 <= directions <= MOST_DIRECTIONS:
        raise ValueError(f"{name} is {directions}; it must be at least 1 and at most {MOST_DIRECTIONS}")
    if per_row < 1 or directions % per_row:
        raise ValueError(
            f"directions_per_row is {per_row}; it must be at least 1 and divide {name} ({directions}) into "
            "groups that are tested by the same rows"
        )


def rows_of_groups(first: int, rows: int, total: int, groups: int) -> list[tuple[int, int]]:
    """`(group, rows)` in order, for the rows `first ... first + rows - 1` of `total`."""
    shares: list[tuple[int, int]] = []
    for group in range(groups):
        # The rows r with floor(r * groups / R) == group.
        start = -(-group * total // groups)
        stop = -(-(group + 1) * total // groups)
        count = min(stop, first + rows) - max(start, first)
        if count > 0:
            shares.append((group, count))
    return shares


def width_of(row_loss: RowLoss) -> int:
    """How many outputs a loss function tells, 0 if it tells none."""
    return row_loss.width if isinstance(row_loss, Composite) else 0


def count_rows(
    engine: Engine, batches: Sequence[Batch], directions: int, per_row: int, width: int | None = None
) -> tuple[int, int, int]:
    """This rank's first row, the rows of all ranks, and the forwards that each rank makes. A collective.

    `width`: of the loss function, if ranks are to tell outputs. ValueError on every rank if a batch is none,
    there are too few rows to test each direction, or ranks have other widths.
    """
    error: ValueError | None = None
    rows = 0
    try:
        if not batches:
            raise ValueError("step_batch got an empty list; a rank without rows passes a batch of 0")
        rows = sum(num_rows(b) for b in batches)
    except ValueError as caught:
        error = caught
    shared = engine.num_groups < engine.num_ranks
    told = [float(digest(repr(_contents(batches))) if error is None else 0)] if shared else []
    widths = [] if width is None else [float(width)]
    counts = engine.exchange([float(rows), float(len(batches)), float(error is not None), *told, *widths])
    if error is not None:
        raise error
    if bool(counts[:, 2].any()):
        raise ValueError(f"rank {int(counts[:, 2].argmax())} was given a bad batch; see its log")
    if shared:
        odd = [rank for rank, teller in enumerate(engine.teller_of) if counts[rank, 3] != counts[teller, 3]]
        if odd:
            raise ValueError(
                f"rank {odd[0]} was given other rows than rank {engine.teller_of[odd[0]]}, though both "
                "compute parts of one model (tensor parallelism, a pipeline): give the ranks of a group the "
                f"same rows, and each of the {engine.num_groups} groups its own (engine.group of the "
                "optimizer is this rank's)"
            )
    if width is not None and bool((counts[:, -1] != width).any()):
        raise ValueError(
            f"ranks were given loss functions of {counts[:, -1].int().tolist()} outputs (0: no Composite): "
            "give all of them the same"
        )
    counts = counts[sorted(set(engine.teller_of))]
    total = int(counts[:, 0].sum())
    if total * per_row < directions:
        raise ValueError(
            f"{directions} directions need at least {directions // per_row} rows per step (each tests "
            f"{per_row}), but all ranks together have {total}; lower directions, give more rows, or raise "
            "directions_per_row"
        )
    return int(counts[: engine.group, 0].sum()), total, int(counts[:, 1].max())


def _contents(value: object) -> object:
    """What tells batches apart, of which other ranks have copies: values, and of other objects the class."""
    if isinstance(value, Tensor):
        return tuple(value.shape), fingerprint(value)
    if isinstance(value, Mapping):
        return [(key, _contents(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [_contents(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


class StepProbes:
    """The probes of one step, evaluated by closure or in stacked forwards, in either perturb mode.

    `drawn`: per direction, the parameters it perturbs. `per_row`: how many directions a row tests. Every
    method returns float64 `[directions, sides, 2]`: summed loss and summed weight of this rank. With
    `outputs`, and of a `Composite`, that is `[directions, sides, 2 + 2 width]`: after these the sums of its
    outputs, and of the derivatives of the losses by them.
    """

    def __init__(
        self,
        engine: Engine,
        drawn: Sequence[Sequence[Param]],
        per_row: int,
        estimator: Estimator,
        eps: float,
        perturbation: ModulePerturbation | ShardPerturbation,
        outputs: bool = False,
    ) -> None:
        self._engine, self._perturbation = engine, perturbation
        self._outputs, self._columns = outputs, 2
        self._drawn, self._per_row, self._estimator, self._eps = drawn, per_row, estimator, eps
        self._probes = [
            [
                Probe(d, sign, frozenset(p.name for p in params) if sign else frozenset())
                for sign in estimator.signs
            ]
            for d, params in enumerate(drawn)
        ]
        # Of each direction and side, the losses and weights of its rows, a tensor for each forward.
        self._seen: list[list[list[Tensor]]] = [[[] for _ in estimator.signs] for _ in drawn]

    def by_closure(self, closure: Closure) -> Tensor:
        """Evaluate `closure` once per probe, on all its rows: directions x sides forwards."""
        with self._installed():
            for sides in self._probes:
                for side, probe in enumerate(sides):
                    with self._shifted(probe, rows=1):
                        sums = self._engine.evaluate(lambda *_: closure_sums(closure).unsqueeze(0), 1, 2)
                    self._seen[probe.direction][side].append(sums)
        return self._total()

    def by_rows(
        self, batches: Sequence[Batch], row_loss: RowLoss, first: int, total: int, num_forwards: int
    ) -> Tensor:
        """Evaluate the rows of this rank's micro-batches, which are rows `first ...` of `total`.

        Module mode: one forward per micro-batch, all its probes stacked. Shard mode: one per probe
        and micro-batch. A rank with fewer than `num_forwards` micro-batches, or without a row for a
        direction, takes part in the gathers with a row that does not count.
        """
        shares = []
        for batch in batches:
            rows = num_rows(batch)
            shares.append(rows_of_groups(first, rows, total, len(self._probes) // self._per_row))
            first += rows
        if self._outputs:
            self._columns = 2 + 2 * width_of(row_loss)
        padded = [*batches, *[batches[0]] * (num_forwards - len(batches))]
        shares += [[]] * (num_forwards - len(batches))
        pieces = list(zip(padded, shares, strict=True))
        if isinstance(self._perturbation, ModulePerturbation):
            return self.stacked(pieces, row_loss)
        for group in range(len(self._probes) // self._per_row):
            for side, probe in self._of_group(group):
                with self._shifted(probe, rows=0):
                    for batch, share in pieces:
                        self._one_probe(batch, share, group, side, probe, row_loss)
        return self._total()

    def stacked(self, pieces: Iterable[tuple[Batch, list[tuple[int, int]]]], row_loss: RowLoss) -> Tensor:
        """Evaluate batches one after another, each with the `(group, rows)` that its rows are of in order.

        Module mode alone. A piece is asked for when the one before it is done, so weights may change between.
        """
        with self._installed():
            for batch, share in pieces:
                self._stacked(batch, share, row_loss)
        return self._total()

    def _of_group(self, group: int) -> list[tuple[int, Probe]]:
        """The probes on the rows of one group, in order, each with its side. The unshifted one comes once."""
        directions = range(group * self._per_row, (group + 1) * self._per_row)
        probes = [(side, probe) for d in directions for side, probe in enumerate(self._probes[d])]
        return [(side, probe) for side, probe in probes if probe.sign or probe.direction == directions[0]]

    def _stacked(self, batch: Batch, share: list[tuple[int, int]], row_loss: RowLoss) -> None:
        assert isinstance(self._perturbation, ModulePerturbation)
        live: list[tuple[Probe, int]] = []
        places: list[list[Tensor]] = []
        pieces: list[tuple[int, int]] = []
        start = 0
        for group, rows in share:
            for side, probe in self._of_group(group):
                live.append((probe, rows))
                places.append(self._seen[probe.direction][side])
                pieces.append((start, start + rows))
            start += rows
        counts = bool(live)
        if not counts:
            # Two equal unshifted probes: this rank then meets whatever the others meet on the way.
            batch, clean = first_row(batch, 2), Probe(-1, 0.0, frozenset())
            live, pieces = [(clean, 1), (clean, 1)], [(0, 1), (0, 1)]
        perturbation, stacked = self._perturbation, sum(rows for _, rows in live)

        def part(start: int, stop: int) -> Tensor:
            probes, ranges = _within(live, pieces, start, stop)
            with perturbation.probes(probes, ranges):
                return self._row_losses(batch, ranges, row_loss)

        sums = self._engine.evaluate(part, stacked, self._columns)
        if not counts:
            return
        for place, of_probe in zip(places, torch.split(sums, [rows for _, rows in live]), strict=True):
            place.append(of_probe)

    def _one_probe(
        self,
        batch: Batch,
        share: list[tuple[int, int]],
        group: int,
        side: int,
        probe: Probe,
        row_loss: RowLoss,
    ) -> None:

        def losses_from(first: int) -> Callable[[int, int], Tensor]:
            return lambda start, stop: self._row_losses(batch, [(first + start, first + stop)], row_loss)

        start = 0
        for mine, rows in share:
            if mine == group:
                seen = self._engine.evaluate(losses_from(start), rows, self._columns)
                self._seen[probe.direction][side].append(seen)
                return
            start += rows
        nothing = first_row(batch, 1), [(0, 1)], row_loss
        self._engine.evaluate(lambda *_: self._row_losses(*nothing), 1, self._columns)

    def _row_losses(self, batch: Batch, pieces: list[tuple[int, int]], row_loss: RowLoss) -> Tensor:
        """float64 `[rows, columns]` on the CPU: loss and weight of each row, and what is told of outputs."""
        rows = sum(b - a for a, b in pieces)
        if self._columns > 2:
            assert isinstance(row_loss, Composite)
            losses, *told = row_loss.with_slopes(self._engine.module, stack_rows(batch, pieces), rows)
            columns = [losses[:, None], torch.ones_like(losses)[:, None], *told]
            return torch.cat([column.double() for column in columns], dim=1).cpu()
        out = row_loss(self._engine.module, stack_rows(batch, pieces))
        losses, weights = out if isinstance(out, tuple) else (out, torch.ones_like(out))
        if losses.shape != (rows,) or weights.shape != (rows,):
            raise ValueError(
                f"the loss function returned shapes {tuple(losses.shape)} and {tuple(weights.shape)} for "
                f"{rows} rows; return one loss per row, or the pair (sums, weights) per row"
            )
        return torch.stack([losses.detach().double(), weights.detach().double()], dim=1).cpu()

    def _installed(self) -> Any:
        if isinstance(self._perturbation, ModulePerturbation):
            return self._perturbation.installed()
        return nullcontext()

    def _shifted(self, probe: Probe, rows: int) -> Any:
        if isinstance(self._perturbation, ModulePerturbation):
            return self._perturbation.probes([(probe, rows)])
        drawn = self._drawn[probe.direction] if probe.drawn else []
        return self._perturbation.shifted(self._engine.spans(drawn), probe)

    def _total(self) -> Tensor:
        """float64 `[directions, sides, columns]`: by direction and side, the sums over rows."""
        total = torch.zeros(len(self._seen), len(self._estimator.signs), self._columns, dtype=torch.float64)
        for direction, sides in enumerate(self._seen):
            first = self._seen[direction - direction % self._per_row]
            signs = self._estimator.signs
            sides = [mine if sign else of_all for sign, mine, of_all in zip(signs, sides, first, strict=True)]
            for of_rows in zip(*sides, strict=True):
                for side, rows in enumerate(self._estimator.clipped(of_rows, self._eps)):
                    total[direction, side] += rows.sum(0)
        return total


def closure_sums(closure: Closure) -> Tensor:
    """float64 `[2]`: the summed loss and weight of one call; ValueError unless both are scalars."""
    out = closure()
    loss, weight = out if isinstance(out, tuple) else (out, 1.0)
    return torch.stack([_scalar(loss), _scalar(weight)])


def _scalar(value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value).detach().to(torch.float64).cpu()
    if tensor.numel() != 1:
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(tensor.shape)}; return a scalar loss, or "
            "the pair (sum, weight), or use step_batch with one loss per row"
        )
    return tensor.reshape(())


def _within(
    live: list[tuple[Probe, int]], pieces: list[tuple[int, int]], start: int, stop: int
) -> tuple[list[tuple[Probe, int]], list[tuple[int, int]]]:
    """`live` and `pieces` of the stacked rows `start ... stop - 1` alone."""
    probes: list[tuple[Probe, int]] = []
    ranges: list[tuple[int, int]] = []
    first = 0
    for (probe, rows), (begin, _) in zip(live, pieces, strict=True):
        a, b = max(start - first, 0), min(stop - first, rows)
        if a < b:
            probes.append((probe, b - a))
            ranges.append((begin + a, begin + b))
        first += rows
    return probes, ranges


def stack_rows(batch: Batch, pieces: list[tuple[int, int]]) -> dict[str, Any]:
    """The given row ranges of every batched tensor, and of every list of as many, one after another."""
    rows = num_rows(batch)

    def stack(value: Any) -> Any:
        if isinstance(value, list) and len(value) == rows:
            return [entry for a, b in pieces for entry in value[a:b]]
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != rows:
            return value
        return torch.cat([value[a:b] for a, b in pieces])

    return {key: stack(value) for key, value in batch.items()}


def first_row(batch: Batch, times: int) -> dict[str, Any]:
    """The batch's first row, `times` over; a batch of no rows gives rows of its form.

    Of ones, such as masks need, of "" in lists, and of 0 where a row has one whole number: its label.
    """
    if num_rows(batch):
        return stack_rows(batch, [(0, 1)] * times)

    def filling(value: Any) -> Any:
        if isinstance(value, list) and not value:
            return [""] * times
        if not isinstance(value, Tensor):
            return value
        is_label = value.ndim == 1 and not value.is_floating_point()
        return value.new_full((times, *value.shape[1:]), 0 if is_label else 1)

    return {key: filling(value) for key, value in batch.items()}
