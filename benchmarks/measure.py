"""The processes of `benchmarks.step`: all methods in turn on one model, engine and batch.

Started by torchrun with one JSON argument (`Setting`); rank 0 writes one JSON line per method.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import memory, subjects
from benchmarks.published import PublishedMeZO
from zo_dist import AdaLeZO, Dense, Flipout, LowRank, Uniform, ZeroOrder
from zo_dist.engines import initialize_process_group, leave_process_group, read_ds_config, select
from zo_dist.engines.build import fsdp2_mesh, shard_with_fsdp2, zero3_engine
from zo_dist.noise import GROUP
from zo_dist.params import evaluating
from zo_dist.planning.collectives import Counted, split
from zo_dist.samplers import Sampler
from zo_dist.structure import Structure
from zo_dist.tasks import choice_loss

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "mezo": Dense,
    "lezo": lambda: Uniform(sparsity=0.75),
    "adalezo": lambda: AdaLeZO(ratio=0.2),
    "lozo": Dense,
    "adalozo": lambda: AdaLeZO(ratio=0.2),
    "flipout": Dense,
    "adaflipout": lambda: AdaLeZO(ratio=0.2),
}
# Directions of rank 2, from normals.
LOW_RANK = ("lozo", "adalozo")
STRUCTURES: dict[str, Structure] = {
    **dict.fromkeys(LOW_RANK, LowRank(rank=2)),
    **dict.fromkeys(("flipout", "adaflipout"), Flipout()),
}
EPS, LR = 1e-3, 1e-7
# MeZO as published costs what ten other methods cost, and hardly varies.
PUBLISHED_ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """One model on one engine. `cases`: `method` or `method:directions`; `out`: the JSON lines."""

    model: str
    engine: str
    rows: int
    length: int
    rounds: int
    dtype: str
    cases: list[str]
    noise: str
    out: str


@dataclass
class Subject:
    """One method, and what was measured of it."""

    method: str
    directions: int
    run: Callable[[], object]
    optimizer: ZeroOrder | None = None
    published: PublishedMeZO | None = None


class Bench:
    """The model, sharded, and each method on it. `before`: bytes in use that are not the model's."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = initialize_process_group()
        torch.manual_seed(0)
        self.dtype = getattr(torch, setting.dtype)
        # Compilers are loaded and kernels made before the model: they do not count as its memory.
        compile_kernels(setting, self.dtype, self.device)
        memory.settled()
        self.before = memory.resident_bytes() if self.device.type == "cpu" else 0
        module = subjects.build(setting.model, self.dtype).to(self.device)
        self.num_params = sum(p.numel() for p in module.parameters())
        vocabulary = module.config.vocab_size
        model = shard(module, setting, self.device)
        self.engine = select(model)
        share = setting.rows // self.engine.num_ranks
        batch = subjects.rows(share, setting.length, vocabulary, self.engine.rank, self.device)
        self.stacked = {key: torch.cat([value, value]) for key, value in batch.items()}
        self.subjects = [
            make(case, setting, model, self.forward, batch, self.stacked) for case in setting.cases
        ]
        for subject in self.subjects:
            subject.run()

    def forward(self, rows: dict[str, torch.Tensor]) -> float:
        with torch.no_grad(), evaluating(self.engine.module):
            loss = float(choice_loss(self.engine.module, rows).sum())
        self.engine.publish()
        return loss


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    bench = Bench(setting)
    seconds: list[list[float]] = [[] for _ in bench.subjects]
    parts: list[list[tuple[float, float]]] = [[] for _ in bench.subjects]
    for round_ in range(setting.rounds):
        for i, subject in enumerate(bench.subjects):
            if subject.published and round_ >= PUBLISHED_ROUNDS:
                continue
            with timed_parts(subject) as part:
                start = time.perf_counter()
                subject.run()
                seconds[i].append(time.perf_counter() - start)
            parts[i].append((part["perturb"], part["update"]))
    if bench.device.type == "cpu":
        memory.map_each_tensor()
    plain = statistics.mean(seconds[[s.method for s in bench.subjects].index("forward")])
    lines = []
    for i, subject in enumerate(bench.subjects):
        mean = statistics.mean(seconds[i])
        perturb, update = (statistics.mean(p[j] for p in parts[i]) for j in (0, 1))
        line = {"method": subject.method, "directions": subject.directions, "ranks": bench.engine.num_ranks}
        line |= {
            key: getattr(setting, key) for key in ("engine", "model", "rows", "length", "dtype", "noise")
        }
        line |= {"params": bench.num_params, "rounds": len(seconds[i])}
        line |= {"seconds": mean, "forwards_per_step": mean / plain}
        line |= {"perturb_s": perturb, "forward_s": mean - perturb - update, "update_s": update}
        lines.append(line | costs(bench, subject))
    if bench.engine.rank == 0:
        with Path(setting.out).open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
    leave_process_group()


def costs(bench: Bench, subject: Subject) -> dict[str, float]:
    """What a step moves and needs: counted in one step, and the peak of three (MeZO as published: of one).

    Beside one of inference each: what a process keeps at rest grows a little with all that it has run.
    """
    with Counted() as counted:
        subject.run()
    weights, others = split(counted.calls, bench.dtype, bench.engine.num_ranks)
    peaks: dict[str, list[int]] = {"inference_peak_bytes": [], "peak_bytes": []}
    for _ in range(1 if subject.published else 3):
        for key, job in zip(peaks, (lambda: bench.forward(bench.stacked), subject.run), strict=True):
            peaks[key].append(memory.peak_bytes(job, bench.device) - bench.before)
    return {key: max(of_key) for key, of_key in peaks.items()} | {
        "gathers_per_weight": sum(c[1] for c in weights) / bench.num_params,
        "scalar_bytes": sum(c[2] for c in others),
    }


def compile_kernels(setting: Setting, dtype: torch.dtype, device: torch.device) -> None:
    optimizer = ZeroOrder(
        nn.Linear(8, 8, bias=False, dtype=dtype, device=device),
        directions=GROUP,
        noise=setting.noise,  # type: ignore[arg-type]
        self_check=False,
        compile=True,
    )
    rows = {"x": torch.ones(GROUP, 8, dtype=dtype, device=device)}
    optimizer.prepare(rows, lambda m, batch: m(batch["x"]).sum(1))


def shard(module: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    if setting.engine == "replicated":
        return module
    if setting.engine == "fsdp2":
        return shard_with_fsdp2(module, fsdp2_mesh(device))
    config = json.loads((Path(__file__).parent.parent / "configs" / "ds_zero3.json").read_text())
    width = module.config.hidden_size
    ranks = torch.distributed.get_world_size()
    ds = read_ds_config(
        config,
        hidden_size=width,
        micro_batch=setting.rows // ranks,
        num_ranks=ranks,
        dtype=getattr(torch, setting.dtype),
    )
    return zero3_engine(module, ds)


def make(
    case: str,
    setting: Setting,
    model: nn.Module,
    forward: Callable[[dict[str, torch.Tensor]], float],
    batch: dict[str, torch.Tensor],
    stacked: dict[str, torch.Tensor],
) -> Subject:
    method, _, count = case.partition(":")
    directions = int(count or 1)
    if method == "forward":
        return Subject(method, 0, lambda: forward(batch))
    if method == "two_forwards":
        return Subject(method, 0, lambda: (forward(batch), forward(batch)))
    if method == "stacked_forward":
        return Subject(method, 0, lambda: forward(stacked))
    if method == "mezo_published":
        published = PublishedMeZO(model, LR, EPS)
        return Subject(
            method, 1, lambda: published.step(lambda: forward(batch) / setting.rows), published=published
        )
    optimizer = ZeroOrder(
        model,
        lr=LR,
        eps=EPS,
        sampler=SAMPLERS[method](),
        directions=directions,
        noise="gaussian" if method in LOW_RANK else setting.noise,  # type: ignore[arg-type]
        structure=STRUCTURES.get(method),
        self_check=False,
        compile=True,
    )
    return Subject(method, directions, lambda: optimizer.step_batch(batch, choice_loss), optimizer=optimizer)


@contextmanager
def timed_parts(subject: Subject) -> Iterator[dict[str, float]]:
    """Inside, the seconds that a step spends on shifting weights and on the update are added up."""
    part = {"perturb": 0.0, "update": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                part[name] += time.perf_counter() - start

        return run

    optimizer = subject.optimizer
    if optimizer is None:
        yield part
        if subject.published:
            part.update({key: subject.published.seconds[key] for key in part})
        return
    noise = optimizer.noise
    noise.shift = timed("perturb", noise.shift)  # type: ignore[method-assign]
    noise.shift_rows = timed("perturb", noise.shift_rows)  # type: ignore[method-assign]
    optimizer._write = timed("update", optimizer._write)  # type: ignore[method-assign]
    try:
        yield part
    finally:
        del noise.shift, noise.shift_rows, optimizer._write


if __name__ == "__main__":
    main()
