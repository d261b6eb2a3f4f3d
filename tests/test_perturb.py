"""The wrapped forward: what a probe sees, and that nothing of it stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import table
import torch
from models import KINDS, build, loss_of, rows_for
from torch import Tensor, nn

import zo_dist
from zo_dist.noise import Noise

EPS, SEED = 2.0**-5, 4


class Spy:
    """A row loss that remembers what it returned."""

    def __init__(self, loss: Any = loss_of) -> None:
        self.loss, self.calls = loss, []  # type: tuple[Any, list[Tensor]]

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        out = self.loss(model, batch)
        self.calls.append((out[0] if isinstance(out, tuple) else out).clone())
        return out


def optimizer_of(model: nn.Module, **options: Any) -> zo_dist.ZeroOrder:
    options = {"lr": 0.0, "eps": EPS, "seed": SEED, "self_check": False, **options}
    return zo_dist.ZeroOrder(model, **options)


def numels_shifted_by(optimizer: zo_dist.ZeroOrder) -> list[int]:
    """Grows with each call that shifts weights, by the number of elements it writes; not by warming up."""
    numels: list[int] = []
    optimizer.prepare({}, loss_of)
    shift = optimizer.noise.shift

    def watched(outs: Any, weight: Tensor, *arguments: Any) -> None:
        numels.append(weight.numel() * len(outs))
        shift(outs, weight, *arguments)

    optimizer.noise.shift = watched  # type: ignore[method-assign]
    return numels


def copy_at(model: nn.Module, direction: int, sign: float, arms: Any, lengths: Any) -> nn.Module:
    """A deep copy of the whole model at weights + sign * eps * length * z, in step 0."""
    shifted, noise = copy.deepcopy(model), Noise("rademacher", SEED)
    drawn = {p.name: length for arm, length in zip(arms, lengths, strict=True) for p in arm.params}
    for name, param in shifted.named_parameters():
        if name in drawn:
            z = noise.values(name, 0, direction, 0, param.numel()).view(param.shape)
            param.data.copy_(param.float() + sign * EPS * drawn[name] * z)
    return shifted


@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stacked_losses_are_those_of_perturbed_copies_of_the_model(kind: str, sampler: str) -> None:
    model, batch, spy = build(kind), rows_for(kind, 4), Spy()
    optimizer = optimizer_of(model, directions=2, sampler=table.SAMPLERS[sampler]())
    draws = [optimizer.sampler.draw(0, direction) for direction in range(2)]
    optimizer.step_batch(batch, spy)
    (stacked,) = spy.calls
    expected = []
    for direction, draw in enumerate(draws):
        rows = {key: value[2 * direction : 2 * direction + 2] for key, value in batch.items()}
        for sign in (1.0, -1.0):
            shifted = copy_at(model, direction, sign, [optimizer.arms[a] for a in draw.arms], draw.lengths)
            out = loss_of(shifted, rows)
            expected.append(out[0] if isinstance(out, tuple) else out)
    wanted = torch.cat(expected)
    assert len(set(wanted.tolist())) == 8
    if kind == "sequential" and sampler == "dense":
        # Every product is of a probe's own slice, as in the copy; the rest is element by element.
        assert torch.equal(stacked, wanted)
    else:
        # Undrawn owners, attention and the loss see all rows at once: products of other shapes may
        # add in another order. A few dozen roundings in sequence on a loss of this size: 64 ulp.
        torch.testing.assert_close(stacked, wanted, rtol=0, atol=64 * 2.0**-23 * float(wanted.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_and_both_ways_to_evaluate_see_the_same_losses(kind: str) -> None:
    losses = {}
    for mode in table.MODES:
        spy = Spy()
        optimizer_of(build(kind), perturb=mode).step_batch(rows_for(kind, 2), spy)
        losses[mode] = torch.cat(spy.calls)
    tolerance = 64 * 2.0**-23 * float(losses["shard"].max())
    torch.testing.assert_close(losses["module"], losses["shard"], rtol=0, atol=tolerance)


class Nested(nn.Module):
    """Owns a weight, and in its forward runs modules that own others; passes tuples and dicts on."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), 1.5))
        self.inner = nn.Linear(3, 3)
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        a, extra = self.pair(self.inner(x) * self.gain, scale=torch.full((1, 3), 0.5))
        out: Tensor = (a + extra["b"]).sum(-1, keepdim=True)
        return out


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x * self.weight, {"b": x * scale, "rows": None}


class Positions(nn.Module):
    """Looks up a [1, T] input that carries no batch, as position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1)
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table(torch.arange(3).unsqueeze(0)).squeeze(-1)
        out: Tensor = (self.first(x) * places).sum(-1, keepdim=True)
        return out


class ReturnsWeight(nn.Module):
    """One of its modules returns its own weight, per row."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(1.0, 4.0).view(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    def __init__(self) -> None:
        super().__init__()
        self.own, self.head = self.Own(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x * self.own(torch.zeros(1)))
        return out


@pytest.mark.parametrize("kind", [Nested, Positions, ReturnsWeight])
@torch.no_grad()
def test_unusual_modules(kind: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
    batch, spy = rows_for("sequential", 4), Spy()
    optimizer = optimizer_of(model, directions=2)
    optimizer.step_batch(batch, spy)
    expected = []
    for direction in range(2):
        rows = {key: value[2 * direction : 2 * direction + 2] for key, value in batch.items()}
        copies = [
            copy_at(model, direction, s, optimizer.arms, [1.0] * len(optimizer.arms)) for s in (1.0, -1.0)
        ]
        expected += [loss_of(shifted, rows) for shifted in copies]
    assert torch.equal(spy.calls[0], torch.cat(expected))


class Lookup(nn.Module):
    """Torch's own embedding, tied; one whose forward computes the ids; one that renorms, not tied."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        own: type[nn.Embedding] = Shifted if kind == "computed" else nn.Embedding
        self.embed = own(512, 24, padding_idx=1, max_norm=3.0 if kind == "renormed" else None)
        self.head = nn.Linear(24, 512, bias=False)
        if kind != "renormed":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids).mean(1))
        return logits


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


@pytest.mark.parametrize("kind", ["own", "computed", "renormed"])
@pytest.mark.parametrize("law", table.LAWS)
@torch.no_grad()
def test_an_embedding_shifts_the_rows_that_are_looked_up(kind: str, law: str) -> None:
    model, ids = Lookup(kind), torch.tensor([[3, 1, 500], [3, 77, 1], [9, 8, 7], [0, 1, 2]])
    model.embed(ids)  # renorms the rows
    optimizer = optimizer_of(model, directions=2, noise=law)
    numels = numels_shifted_by(optimizer)
    spy = Spy(lambda m, b: m(b["ids"]).square().mean(1))
    optimizer.step_batch({"ids": ids}, spy)
    # The head reads all rows on both sides of both directions; the lookup does only if it has to.
    assert sum(numels) == 512 * 24 * 4 * (1 if kind == "own" else 2)
    expected = []
    for direction in range(2):
        for sign in (1.0, -1.0):
            shifted = copy.deepcopy(model)
            for name, param in shifted.named_parameters():
                z = Noise(law, SEED).values(name, 0, direction, 0, param.numel())  # type: ignore[arg-type]
                param.data.add_(z.view(512, 24) * EPS * sign)
            expected.append(shifted(ids[2 * direction : 2 * direction + 2]).square().mean(1))
    assert torch.equal(spy.calls[0], torch.cat(expected))


@pytest.mark.parametrize("limit", [0, 500])
@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_large_owners_are_shifted_side_by_side_and_in_parts(
    kind: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, counts = [], []
    for large in (limit, 1 << 24):
        monkeypatch.setattr("zo_dist.perturb._LARGE", large)
        monkeypatch.setattr("zo_dist.kernels.PART", large)
        spy, optimizer = Spy(), optimizer_of(build(kind), directions=2)
        numels = numels_shifted_by(optimizer)
        optimizer.step_batch(rows_for(kind, 4), spy)
        losses.append(spy.calls[0])
        counts.append(len(numels))
    assert counts[0] > counts[1]
    # Outputs of fewer columns may add in another order: a few dozen roundings of a loss of this size.
    torch.testing.assert_close(*losses, rtol=0, atol=64 * 2.0**-23 * float(losses[1].max()))


class ReadsOutside(nn.Module):
    """Uses a Linear's weight without running the Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = nn.Linear(3, 3), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.unused.weight)


def test_an_owner_that_never_runs_is_an_error_in_module_mode_alone() -> None:
    batch = rows_for("sequential", 2)
    with pytest.raises(RuntimeError, match=r"unused\.weight(.|\n)*perturb: shard"):
        optimizer_of(ReadsOutside()).step_batch(batch, loss_of)
    model = ReadsOutside()
    optimizer_of(model).engine.module.requires_grad_(True)
    assert optimizer_of(model, perturb="shard").step_batch(batch, loss_of) > 0


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_stays_after_a_step(mode: str, fails: bool) -> None:
    model, clean = build("llama"), build("llama")
    identities = {name: id(p) for name, p in model.named_parameters()}
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    optimizer = optimizer_of(model, perturb=mode, directions=2)

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        out = loss_of(module, batch)
        if fails:
            raise KeyError("on purpose")
        return out

    if fails:
        with pytest.raises(KeyError, match="on purpose"):
            optimizer.step_batch(rows_for("llama", 2), loss)
    else:
        optimizer.step_batch(rows_for("llama", 2), loss)
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    for (name, got), wanted in zip(model.state_dict().items(), clean.state_dict().values(), strict=True):
        assert torch.equal(got, wanted), name


def test_names_and_state_dict_are_the_users_own_during_a_step() -> None:
    model = build("llama")
    before, seen = list(model.state_dict()), []

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        seen.append(list(module.state_dict()))
        return loss_of(module, batch)

    optimizer_of(model).step_batch(rows_for("llama", 2), loss)
    assert seen == [before]


class Routed(nn.Module):
    """Hands an uneven choice of rows to an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x)) < len(x) - 1
        routed = x.clone()
        routed[chosen] = self.expert(x[chosen])
        out: Tensor = self.head(routed)
        return out


def test_routed_tokens_that_do_not_divide_are_an_error_with_a_remedy() -> None:
    batch = rows_for("sequential", 3)
    with pytest.raises(RuntimeError, match=r"does not divide into 6 stacked rows(.|\n)*step\(closure\)"):
        optimizer_of(Routed()).step_batch(batch, loss_of)
    model = Routed()
    assert optimizer_of(model).step(lambda: loss_of(model, batch).mean()) > 0


@pytest.mark.parametrize("mode", table.MODES)
def test_autocast_around_the_closure_sees_each_probe(mode: str) -> None:
    """Autocast keeps its 16-bit copy of a parameter; a stale one would make both sides equal."""
    model, batch = build("sequential"), rows_for("sequential", 4)
    slopes = {}
    for cast in (False, True):
        optimizer = optimizer_of(model, perturb=mode, eps=0.125)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            optimizer.step(lambda: loss_of(model, batch).mean())
        slopes[cast] = optimizer.record.slopes[0]
    assert slopes[True] != 0.0
    # bfloat16 keeps 8 bits: each loss is off by a few times 2**-8 of itself, over 2 eps = 1/4.
    loss = float(loss_of(model, batch).mean().detach())
    assert slopes[True] == pytest.approx(slopes[False], abs=8 * 2.0**-8 * (1 + loss) / 0.25)
    assert abs(slopes[False]) > 0.1
