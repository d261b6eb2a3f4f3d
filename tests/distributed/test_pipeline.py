"""Layers on one rank each: the same run as on one process, and what goes over the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
import transformers
from injected import Injected, remembered_noise
from models import LENGTH, VOCAB, build, loss_of, rows_for
from tiny_run import as_on_one_process
from torch import Tensor, nn
from workers import Pool, digest, whole_weights

import zo_dist
from zo_dist.checkpoint import save_model
from zo_dist.planning.collectives import Counted
from zo_dist.snapshot import load_snapshot, save_snapshot

STEPS, ROWS, WIDTH = 20, 12, 16
KINDS = ("llama", "llama_tied", "qwen3", "opt", "gpt2")


def deep(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of tests/models.py with three layers, for three ranks."""
    small = build(kind)
    config = small.config
    config.num_hidden_layers = 3
    if hasattr(config, "layer_types"):
        config.layer_types = [config.layer_types[0]] * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(small)(config)
        for name, param in model.named_parameters():
            nn.init.normal_(param, 1.0 if param.ndim == 1 and name.endswith("weight") else 0.0, 0.3)
    return model.to(dtype).eval()


def optimizer_of(model: Any, parts: int | None, **options: Any) -> zo_dist.ZeroOrder:
    settings: dict[str, Any] = {"lr": 2.0**-7, "eps": 2.0**-6, "directions": 3, "sampler": "adalezo"}
    cut = model if parts is None else zo_dist.pipeline(model, num_micro_batches=parts)
    return table.optimizer(cut, **{**settings, **options})


def given_losses(kind: str, parts: int | None, dtype: torch.dtype, **options: Any) -> str:
    """The weights after steps whose losses are known numbers; `parts` is None without a pipeline."""
    with remembered_noise():
        optimizer = optimizer_of(deep(kind, dtype), parts, self_check=False, **options)
        loss = Injected("module", optimizer.directions, parts or 1)
        for _ in range(STEPS):
            optimizer.step_batch(rows_for(kind, ROWS), loss)
        return digest(whole_weights(optimizer))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", torch.float32, {"directions": 1}),
        ("llama_tied", torch.bfloat16, {"directions": 3}),
        ("opt", torch.bfloat16, {"directions": 6, "rounding": "kahan", "rule": "adam", "noise": "gaussian"}),
    ],
)
def test_given_losses_leave_the_bits_of_one_process(
    pool: Callable[[int], Pool], num_ranks: int, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # 24 stacked rows: 4 parts of 6.
    got = pool(num_ranks).run(_given, kind, 4, dtype, options)
    assert got == [given_losses(kind, None, dtype, **options)] * num_ranks
    assert got[0] != digest(dict(deep(kind, dtype).named_parameters()))


def _given(kind: str, parts: int, dtype: torch.dtype, options: dict[str, Any]) -> str:
    return given_losses(kind, parts, dtype, **options)


def own_losses(kind: str, parts: int | None, how: str, directions: int) -> list[float]:
    """What a few steps return, the start-up check before them."""
    optimizer = optimizer_of(
        deep(kind), parts, perturb="shard" if how == "shard" else "module", directions=directions
    )
    # Parts that do not divide the rows.
    batch = rows_for(kind, 7)
    closure = lambda: tuple(x.sum() for x in loss_of(optimizer.engine.module, batch))  # noqa: E731
    steps = [
        optimizer.step(closure) if how == "closure" else optimizer.step_batch(batch, loss_of) for _ in "abc"
    ]
    return steps


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_own_losses_are_those_of_one_process(pool: Callable[[int], Pool], kind: str, num_ranks: int) -> None:
    """Each rank returns them. A product over fewer rows may be added up in another order, no more.

    So a loss differs by a few dozen roundings (test_perturb.py), a coefficient by that over eps, and a step
    with lr 2**-7 moves a weight by 2**-7 of it, which moves a loss by less than 10 times as much.
    """
    cases = [("module", 1), ("module", 3), ("shard", 2), ("closure", 1)]
    for case, got in zip(cases, zip(*pool(num_ranks).run(_own, kind, cases), strict=True), strict=True):
        assert all(of_rank == got[0] for of_rank in got)
        expected = own_losses(kind, None, *case)
        tolerance = 64 * 2.0**-23 * max(expected) * (1 + 3 * 10 * 2.0**-7 / 2.0**-6)
        assert got[0] == pytest.approx(expected, rel=0, abs=tolerance), case
        assert abs(expected[0] - expected[2]) > 10 * tolerance


def _own(kind: str, cases: list[tuple[str, int]]) -> list[list[float]]:
    return [own_losses(kind, 4, *case) for case in cases]


def take_steps(optimizer: zo_dist.ZeroOrder, steps: int) -> zo_dist.ZeroOrder:
    for _ in range(steps):
        optimizer.step_batch(rows_for("llama", ROWS), Injected("module", 3, 1))
    return optimizer


def state_of(optimizer: zo_dist.ZeroOrder) -> tuple[str, str, int]:
    return digest(whole_weights(optimizer)), repr(optimizer.scalars["parts"]), optimizer.step_count


def save_there(kind: str, parts: int | None, folder: str) -> tuple[str, str, int]:
    optimizer = take_steps(_momentum(kind, parts), 3)
    save_snapshot(optimizer, folder)
    return state_of(optimizer)


def load_there(kind: str, parts: int | None, path: str) -> tuple[str, str, int]:
    optimizer = _momentum(kind, parts)
    load_snapshot(optimizer, path)
    return state_of(optimizer)


def _momentum(kind: str, parts: int | None) -> zo_dist.ZeroOrder:
    kept = {"rule": "momentum", "rounding": "kahan", "self_check": False}
    return optimizer_of(deep(kind, torch.bfloat16), parts, **kept)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_snapshots_go_to_and_from_one_process(pool: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    saved = pool(3).run(save_there, kind, 1, str(tmp_path / "cut"))
    assert [load_there(kind, None, str(tmp_path / "cut/step-00000003"))] * 3 == saved
    one = save_there(kind, None, str(tmp_path / "whole"))
    assert pool(2).run(load_there, kind, 1, str(tmp_path / "whole/step-00000003")) == [one] * 2


def export(kind: str, path: str) -> str:
    optimizer = take_steps(optimizer_of(deep(kind), 1, self_check=False), 2)
    save_model(optimizer.engine, path)
    return digest(whole_weights(optimizer))


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_an_export_is_the_whole_model(pool: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    got = pool(3).run(export, kind, str(tmp_path / "model"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert got == [digest(dict(loaded.named_parameters()))] * 3


def held_and_sent(parts: int) -> tuple[int, list[tuple[str, int]]]:
    """The bytes of weights here, and by kind of call what a step puts on the wire."""
    optimizer = optimizer_of(deep("llama"), parts, self_check=False)
    batch = rows_for("llama", ROWS)
    optimizer.step_batch(batch, loss_of)
    with Counted() as counted:
        optimizer.step_batch(batch, loss_of)
    weights = {
        p.data_ptr(): p.nbytes for p in optimizer.engine.module.parameters() if p.device.type != "meta"
    }
    return sum(weights.values()), [(name, size) for name, _, size, _ in counted.calls]


def test_a_step_sends_hidden_states_and_scalars(pool: Callable[[int], Pool]) -> None:
    results = pool(3).run(held_and_sent, 4)
    assert sum(held for held, _ in results) == sum(p.nbytes for p in deep("llama").parameters())
    for rank, (_, calls) in enumerate(results):
        sent = [size for name, size in calls if name == "send"]
        # Two sides of each row, in 4 parts, to the next rank.
        assert sent == [2 * ROWS // 4 * LENGTH * WIDTH * 4] * (4 if rank < 2 else 0)
        others = [size for name, size in calls if name not in ("send", "recv_", "recv_any_source_")]
        # The numbers of rows, then 2 float64 for each of 2 sides of 3 directions, and a digest.
        assert sum(others) == 8 * 4 + 8 * (2 * 2 * 3 + 1), calls


class Shares(nn.Module):
    """A layer's input is not the output of the one before it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, VOCAB)
        self.how = how
        if how == "of its own":
            self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = start = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) if self.how != "once each" else layer(start) + x
            x = self.layers[0](x) if self.how == "twice" else x
        # What the layers never handed on.
        logits = self.head(x + start if self.how == "other logits" else x)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def cut(what: str) -> None:
    model = {"sequential": build("sequential"), "llama": build("llama")}.get(what) or Shares(what)
    zo_dist.pipeline(model, num_micro_batches=2)


@pytest.mark.parametrize(
    ("what", "num_ranks", "message"),
    [
        ("llama", 3, "2 layers, too few for a pipeline of 3 ranks"),
        ("sequential", 2, "it is called as no causal language model"),
        ("once each", 2, "layers do not run once each"),
        ("twice", 2, "layers do not run once each"),
        ("of its own", 2, "holds weights of its own"),
        ("other logits", 2, "give other logits than the whole"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_every_rank(
    pool: Callable[[int], Pool], what: str, num_ranks: int, message: str
) -> None:
    for error in pool(num_ranks).errors(cut, what):
        assert error.startswith("ValueError")
        assert message in error


def wrong(what: str) -> None:
    import torch.distributed as dist

    model = deep("llama")
    if what == "no parts on one":
        zo_dist.pipeline(model, num_micro_batches=dist.get_rank())
    if what == "a transposed weight on one" and dist.get_rank():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().T.contiguous().T)
    if what == "other parts":
        zo_dist.pipeline(model, num_micro_batches=1 + dist.get_rank())
    if what == "other weights":
        nn.init.constant_(model.lm_head.weight, dist.get_rank())
        zo_dist.pipeline(model, num_micro_batches=1)
    optimizer = optimizer_of(model, 2)
    if what == "cut twice":
        zo_dist.pipeline(model, num_micro_batches=2)
    if what == "other rows":
        optimizer.step_batch(rows_for("llama", ROWS, seed=dist.get_rank()), loss_of)
    if what == "other names":
        # Objects that are no values tell nothing.
        for name in ("one", f"rank {dist.get_rank()}"):
            beside = {"object": object(), "names": [name]}
            optimizer.step_batch({**rows_for("llama", ROWS), "beside": beside}, loss_of)
            assert name == "one"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no parts on one", "num_micro_batches is 0"),
        ("a transposed weight on one", "lm_head.weight is not contiguous"),
        ("other parts", "num_micro_batches must be the same on every rank"),
        ("other weights", "lm_head.weight must be the same on every rank"),
        ("cut twice", "stage of a pipeline already"),
        ("other rows", "was given other rows"),
        ("other names", "was given other rows"),
    ],
)
def test_wrong_use_is_refused_by_every_rank(pool: Callable[[int], Pool], what: str, message: str) -> None:
    for error in pool(2).errors(wrong, what):
        assert error.startswith("ValueError")
        assert message in error


def test_a_run_by_command_is_that_of_one_process(tmp_path: Path) -> None:
    """With its evaluations, which flow in parts too."""
    other = as_on_one_process(tmp_path, {"kind": "pipeline", "micro_batches": 4})
    assert (other["engine"], other["ranks"]) == ("pipeline", 2)
