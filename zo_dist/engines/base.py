"""What every engine is and does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_dist.engines.agreement import digest, fingerprint, moment_sums, require_alike
from zo_dist.engines.processes import wait_for_gloo_at_exit
from zo_dist.params import Param, Piece, Span

# Of an error message sent to the other ranks.
_REASON_BYTES = 600


class Engine:
    """One way of holding a model's weights. One rank is N ranks with N = 1.

    `module`: what a forward is called on. `rank`, `num_ranks`: over all processes. They form `num_groups`
    groups, of which this rank is in number `group`: the ranks of one take the same rows, and one of them
    tells the losses. A group is one rank, those over which tensor parallelism cuts layers, or a pipeline.
    `device`: where the model computes. `has_copies`: does another rank hold what this one does? Subclasses
    say which part of a parameter this rank holds.
    """

    name = "engine"
    has_copies = False
    # What forwards cast weights to, where they do.
    compute_dtypes: frozenset[torch.dtype] = frozenset()
    # May the layers before the first drawn one run once for all probes (prefix.py)?
    shares_prefix = True

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.num_ranks = dist.get_world_size() if distributed else 1
        if distributed:
            wait_for_gloo_at_exit()
        # Of each rank, the one of its group that tells the losses.
        self.teller_of = list(range(self.num_ranks))
        # Scalars go over gloo where there is one: reading them then waits for no GPU kernel.
        self._scalar_device = torch.device("cpu")
        if distributed and "gloo" not in str(dist.get_backend_config()):
            self._scalar_device = device

    @property
    def num_groups(self) -> int:
        return len(set(self.teller_of))

    @property
    def group(self) -> int:
        return sorted(set(self.teller_of)).index(self.teller_of[self.rank])

    def _take_rows_with(self, ranks: Sequence[int]) -> None:
        """Make one group of these ranks, this one among them, of as many on every rank: a collective."""
        if len(ranks) > 1:
            self.teller_of = [int(teller) for teller in self.exchange([float(min(ranks))]).flatten()]

    def shape_of(self, param: nn.Parameter) -> torch.Size:
        """The whole parameter's shape, whatever part is here."""
        return param.shape

    def piece_of(self, name: str, param: nn.Parameter) -> Piece | None:
        """What of a parameter is here while its owner runs; None for all of it."""
        return None

    def spans(self, params: Iterable[Param]) -> list[Span]:
        """The parts of `params` that this rank owns, as views that the next forward reads from.

        A rank may own nothing of a parameter; then it has no span here.
        """
        spans = (self._span(p) for p in params)
        return [s for s in spans if s is not None and s.numel]

    def _span(self, param: Param) -> Span | None:
        raise TypeError(f"{type(self).__name__} does not say which span of a parameter it holds")

    def here(self, params: Iterable[Param]) -> list[Param]:
        """Those of `params` that modules use which run on this rank, with these as their owners."""
        return list(params)

    def evaluate(self, part: Callable[[int, int], Tensor], rows: int, width: int) -> Tensor:
        """float64 `[rows, width]` on the CPU: what `part(start, stop)` has for parts of the rows, in order.

        `part` calls the model once and returns `[stop - start, width]`. Every rank that takes these rows must
        call it; one that does not learn their losses gets zeros.
        """
        return part(0, rows).to("cpu", torch.float64)

    def publish(self) -> None:
        """Make the next forward see what was written to spans."""

    def whole(self, param: Param) -> AbstractContextManager[Tensor]:
        """Inside, the whole weight, to be read only. A collective: every rank must enter."""
        return nullcontext(param.param.detach())

    def exchange(self, values: Sequence[float] | Tensor) -> Tensor:
        """float64 `[num_ranks, n]` on the CPU: every rank's `n` numbers, in rank order.

        The one collective of a step besides weight gathers: 8 n bytes sent by each rank.
        """
        mine = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
        if self.num_ranks == 1:
            return mine.cpu().unsqueeze(0)
        mine = mine.to(self._scalar_device)
        everyone = mine.new_empty(self.num_ranks * mine.numel())
        dist.all_gather_single(everyone, mine)
        return everyone.cpu().view(self.num_ranks, -1)

    def reduce(self, values: Tensor, alike: object = None) -> Tensor:
        """Sum of float64 `values` over groups, added in order: the same bits everywhere.

        `alike`: what must be the same on every rank, compared by a digest of its `repr` that travels
        along (8 bytes). Raises DesyncError on every rank, naming those that differ, if it is not.
        """
        mine = values.reshape(-1)
        everyone = self.exchange(torch.cat([mine, mine.new_tensor([digest(repr(alike))])]))
        digests = everyone[:, -1].tolist()
        require_alike(dict(enumerate(digests)), "what they draw in this step or wrote in the last")
        first, *others = sorted(set(self.teller_of))
        total = everyone[first, :-1].clone()
        for row in everyone[others, :-1]:
            total += row
        return total.view(values.shape)

    def holders(self, params: Sequence[Param]) -> dict[str, list[tuple[int, int, int]]]:
        """For each weight `(rank, offset, numel)` of every rank that holds a piece of it. A collective."""
        spans = {span.name: (span.offset, span.numel) for span in self.spans(params)}
        mine = [float(x) for param in params for x in spans.get(param.name, (0, 0))]
        everyone = self.exchange(mine).to(torch.int64).view(self.num_ranks, -1, 2).tolist()
        return {
            param.name: [(rank, *theirs[i]) for rank, theirs in enumerate(everyone) if theirs[i][1]]
            for i, param in enumerate(params)
        }

    def fingerprints(self, params: Sequence[Param]) -> dict[str, int]:
        """64 bits of each whole weight, for any number of ranks and way of sharding the same.

        A collective of 32 bytes per parameter and rank, after one pass over this rank's weights. Raises
        DesyncError, naming the ranks, where two hold different copies of the same piece.
        """
        bits = {span.name: fingerprint(span.flat, span.offset, span.runs) for span in self.spans(params)}
        mine = [float(x) for p in params for x in divmod(bits.get(p.name, 0), 1 << 32)]
        everyone = self.exchange(mine).to(torch.int64).view(self.num_ranks, -1, 2).tolist()
        whole: dict[str, int] = {}
        for i, (name, holders) in enumerate(self.holders(params).items()):
            pieces: dict[int, dict[int, int]] = {}
            for rank, offset, _ in holders:
                high, low = everyone[rank][i]
                pieces.setdefault(offset, {})[rank] = high << 32 | low
            for copies in pieces.values():
                require_alike(copies, f"the weight {name}")
            whole[name] = sum(next(iter(copies.values())) for copies in pieces.values()) & (1 << 64) - 1
        return whole

    def add_up(
        self, params: Sequence[Param], numbers: Mapping[str, Sequence[float] | Tensor], width: int
    ) -> dict[str, list[int]]:
        """Whole numbers of the pieces that ranks hold, `width` for each weight, added up to the whole's.

        `numbers`: those of this rank's pieces, by name. A piece that several ranks hold counts once. A
        collective of 8 `width` bytes per parameter and rank, and `holders`.
        """
        mine = torch.zeros(len(params), width, dtype=torch.float64)
        for i, param in enumerate(params):
            if param.name in numbers:
                mine[i] = torch.as_tensor(numbers[param.name], dtype=torch.float64)
        everyone = self.exchange(mine).to(torch.int64).view(self.num_ranks, len(params), width)
        totals = {}
        for i, (name, holders) in enumerate(self.holders(params).items()):
            ranks = list({offset: rank for rank, offset, _ in holders}.values())
            totals[name] = everyone[ranks, i].sum(0).tolist()
        return totals

    def moments(self, params: Sequence[Param]) -> dict[str, tuple[float, float]]:
        """Mean and variance of each whole weight, the same bits for any number of ranks and sharding.

        A collective of 32 bytes per parameter and rank (and `holders`), after a pass over this rank's
        weights. Accurate to about 2**-24 and 2**-32.
        """
        sums = {span.name: moment_sums(span.flat) for span in self.spans(params)}
        # In halves, which are exact in a float64.
        halves = {name: [x for s in both for x in divmod(s, 1 << 32)] for name, both in sums.items()}
        totals, found = self.add_up(params, halves, 4), {}
        for param in params:
            high, low, high_square, low_square = totals[param.name]
            mean = ((high << 32) + low) / (param.numel << 24)
            square = ((high_square << 32) + low_square) / (param.numel << 32)
            found[param.name] = mean, max(0.0, square - mean * mean)
        return found

    def require_equal(
        self, what: str, settings: Mapping[str, object], among: Sequence[int] | None = None
    ) -> None:
        """Raise ValueError on every rank if a setting differs between ranks, naming the settings.

        `among`: the ranks that this one must agree with, where those are not all.
        """
        digests = [digest(f"{key}={value!r}") for key, value in settings.items()]
        everyone = self.exchange([float(len(digests)), float(digest(repr(list(settings))))])
        if bool((everyone != everyone[0]).any()):
            raise ValueError(f"ranks disagree on which settings {what} has")
        theirs = self.exchange([float(d) for d in digests])[slice(None) if among is None else among]
        differs = (theirs != everyone.new_tensor(digests)).any(0)
        differing = self.exchange(differs.to(torch.float64)).any(0)
        names = [key for key, differ in zip(settings, differing.tolist(), strict=True) if differ]
        if names:
            raise ValueError(
                f"ranks disagree on {what}: {', '.join(names)} must be the same on every rank "
                f"(rank {self.rank} has {', '.join(f'{n}={settings[n]!r}' for n in names)})"
            )

    def compare_copies(self, pieces: Iterable[tuple[str, Tensor]], holders: Sequence[int]) -> None:
        """Take note of the ranks that hold the same pieces of weights as this one, itself among them.

        Every rank must call it. ValueError on every rank if copies differ anywhere.
        """
        self.has_copies |= len(holders) > 1
        if len(holders) > 1:
            prints = {name: fingerprint(piece) for name, piece in pieces}
            self.require_equal("the starting weights", prints, among=holders)

    def compare_pieces(self, pieces: Mapping[str, Tensor], places: Mapping[str, int]) -> None:
        """`compare_copies` among ranks that have the same number in `places`, for each weight by itself."""
        everyone = self.exchange([float(place) for place in places.values()])
        alike: dict[tuple[float, ...], list[str]] = {}
        for name, column in zip(places, everyone.T.tolist(), strict=True):
            alike.setdefault(tuple(column), []).append(name)
        for column, names in alike.items():
            holders = [rank for rank, place in enumerate(column) if place == column[self.rank]]
            self.compare_copies(((name, pieces[name]) for name in names), holders)

    def together(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error, so that none waits for one that left."""
        failed = self.exchange([float(error is not None)]).flatten().nonzero().flatten().tolist()
        if not failed:
            return
        # The reason travels too: rank 0, which people read, may not be the rank that failed.
        text = str(error).encode()[:_REASON_BYTES] if self.rank == failed[0] else b""
        reasons = self.exchange([float(byte) for byte in text.ljust(_REASON_BYTES, b"\0")])
        if error is not None:
            raise error
        reason = bytes(int(x) for x in reasons[failed[0]].tolist()).rstrip(b"\0").decode(errors="ignore")
        raise ValueError(f"stopped because rank {failed[0]} failed: {reason}")

    @contextmanager
    def jointly(self) -> Iterator[None]:
        """Run a block without collectives; if it raises on any rank, every rank raises at its end."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.together(error)


def await_each_forward(module: nn.Module) -> None:
    """Make a forward of `module` return only when the device is done: for weights kept on the CPU.

    They are copied to the device asynchronously from pinned memory. A write must not overtake the
    copies of a forward whose loss this rank does not read, as when none of its rows counted.
    """
    module.register_forward_hook(lambda *_: torch.accelerator.synchronize())
