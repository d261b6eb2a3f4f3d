"""The plan of a run: every mode's memory, traffic and seconds, what fits, and which is recommended."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from zo_dist.config import Config
from zo_dist.engines import DsConfig, read_ds_config
from zo_dist.mask import SmallWeights
from zo_dist.models import freeze, longest_input
from zo_dist.optimizer import Perturb, ZeroOrder
from zo_dist.params import find_layers
from zo_dist.planning import formulas
from zo_dist.planning.formulas import Drawn, Memory, Mode, Seconds, Sharded, Traffic, Work
from zo_dist.planning.hardware import Cluster
from zo_dist.planning.meta import Rows, Traced, busiest_rows, trace_forward, trace_step
from zo_dist.planning.sharding import ZERO3
from zo_dist.probes import rows_of_groups
from zo_dist.samplers import Dense, Draw
from zo_dist.tasks import COMPOSITES, get_task
from zo_dist.tasks.metrics import TEXT_METRICS

# Draws that the seconds of a step are a mean over, where a sampler leaves arms out.
_DRAWS = 3

_WAYS: tuple[Perturb, ...] = get_args(Perturb)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One mode; `refused`: why it cannot run, and then there are no figures."""

    mode: Mode
    name: str
    refused: str = ""
    memory: Memory | None = None
    traffic: Traffic | None = None
    seconds: Seconds | None = None
    fits: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `make_plan` returns.

    `ds`: what ZeRO-3 is planned with; `facts`: of the model and its rows; `assumed`: what figures rest on.
    """

    config: Config
    cluster: Cluster
    ds: DsConfig
    facts: dict[str, Any]
    modes: tuple[Planned, ...]
    assumed: tuple[str, ...]

    @property
    def recommended(self) -> Planned | None:
        """Of the modes that fit, the fastest with nothing hidden, to the nearest 5%; then the first."""
        fitting = [(p.seconds.apart, p) for p in self.modes if p.fits and p.seconds is not None]
        if not fitting:
            return None
        best = min(seconds for seconds, _ in fitting)
        return next(p for seconds, p in fitting if seconds <= 1.05 * best)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, elements and seconds, as computed."""
        chosen = self.recommended
        modes = []
        for planned in self.modes:
            mode: dict[str, Any] = {"name": planned.name, **dataclasses.asdict(planned.mode)}
            del mode["stored"]
            if planned.memory and planned.traffic and planned.seconds:
                mode["memory"] = {**dataclasses.asdict(planned.memory), "total": planned.memory.total}
                mode["traffic"] = dataclasses.asdict(planned.traffic)
                bounds = {"hidden": planned.seconds.hidden, "apart": planned.seconds.apart}
                mode["seconds"] = {**dataclasses.asdict(planned.seconds), **bounds}
            modes.append({**mode, "fits": planned.fits, "refused": planned.refused})
        cluster = dataclasses.asdict(self.cluster)
        return {
            "computed": "from shapes; nothing was measured",
            "model": self.facts,
            "cluster": {**cluster, "nodes": self.cluster.nodes, "usable_bytes": self.cluster.usable_bytes},
            "assumed": list(self.assumed),
            "modes": modes,
            "recommended": None if chosen is None else {"name": chosen.name, "perturb": chosen.mode.perturb},
        }


def make_plan(
    config: Config,
    shape: PretrainedConfig,
    cluster: Cluster,
    *,
    length: int,
    answer: int = 1,
    engines: Mapping[str, bool] | None = None,
    perturb: str | None = None,
    ds: DsConfig | None = None,
) -> Plan:
    """Plan `config` on `cluster` for a model of this shape, whose rows have `length` tokens.

    `answer`: tokens of a row whose logits are needed. `engines`: `{engine: is it offloaded}` if not all are
    asked for; `perturb`: one of the two ways, or both. `ds`: the DeepSpeed config of ZeRO-3. ValueError for a
    model whose forward depends on the values of its data, for lengths that it does not take, and for an
    objective of generated text, whose forwards per probe depend on what is written.
    """
    if config.train.objective in TEXT_METRICS:
        raise ValueError(
            f"train.objective is {config.train.objective}: each probe writes a text, one forward per token, "
            "which is not planned; plan train.objective=loss, and take its gathers and seconds up to "
            f"data.max_new_tokens ({config.data.max_new_tokens}) times"
        )
    longest = longest_input(shape)
    if not 2 <= length <= (longest or length):
        raise ValueError(f"rows of {length} tokens; this model takes 2 to {longest}")
    if not 1 <= answer < length:
        raise ValueError(f"the answer has {answer} tokens; it must have 1 to {length - 1}, below the row's")
    subject = _Subject(config, shape, cluster.count, length, answer)
    if ds is None:
        hidden = getattr(shape.get_text_config(), "hidden_size", None)
        micro = config.train.micro_rows or -(-config.train.rows // cluster.count)
        ds = read_ds_config(
            ZERO3,
            hidden_size=hidden,
            micro_batch=micro,
            num_ranks=cluster.count,
            dtype=config.model.torch_dtype,
        )
    zero = ds.config["zero_optimization"]
    unknown = [key for key in ("leaf_module", "stage3_use_all_reduce_for_fetch_params") if zero.get(key)] + [
        key for key in ("stage3_module_granularity_threshold",) if zero.get(key)
    ]
    planned = []
    for mode in modes_of(config, cluster, engines, perturb):
        if mode.engine == "zero3" and unknown:
            reason = f"plan does not know what zero_optimization.{unknown[0]} makes of the gathers"
            planned.append(Planned(mode=mode, name=mode.name(cluster.count), refused=reason))
            continue
        planned.append(subject.planned(mode, cluster, zero))
    return Plan(
        config=config,
        cluster=cluster,
        ds=ds,
        facts=subject.facts,
        modes=tuple(planned),
        assumed=_assumed(cluster, subject, length, answer),
    )


def modes_of(
    config: Config, cluster: Cluster, engines: Mapping[str, bool] | None, perturb: str | None
) -> Iterator[Mode]:
    """Engines, sharded over all ranks or (HSDP) over those of a node, and both ways to perturb."""
    computed, stored = config.engine.torch_compute_dtype, config.model.torch_dtype
    cast_from = None if computed in (None, stored) else stored
    count, asked = cluster.count, config.engine.shard_ranks
    if asked is not None and count % asked:
        raise ValueError(f"engine.shard_ranks is {asked}; it must divide the number of ranks, {count}")
    of_all = asked or count
    groups = [of_all] + [cluster.per_node] * (asked is None and 1 < cluster.per_node < count)
    every: list[tuple[Sharded, int, bool]] = [("replicated", 1, False)]
    every += [("fsdp2", ranks, False) for ranks in groups] + [("zero3", ranks, False) for ranks in groups]
    every += [("fsdp2", of_all, True), ("zero3", of_all, True)]
    for engine, ranks, offload in every:
        if engines is not None and (engine not in engines or engines[engine] != offload):
            continue
        for way in _WAYS:
            if perturb in (None, way):
                yield Mode(engine=engine, ranks=ranks, perturb=way, offload=offload, stored=cast_from)


def outputs_of(config: Config) -> int:
    """How many outputs of the loss function ranks agree on: what a jacobian asks of a task that has some."""
    composite = COMPOSITES.get(get_task(config.data.task).loss)
    return composite.width if composite is not None and config.tells_outputs else 0


class _Subject:
    """The model and optimizer of a config on the meta device, and the forwards of its steps."""

    def __init__(self, config: Config, shape: PretrainedConfig, count: int, length: int, answer: int) -> None:
        self._config, self._count = config, count
        # In the dtype that it computes in; shards may have another (`Mode.stored`).
        computed = config.engine.torch_compute_dtype or config.model.torch_dtype
        self.module = unfilled(config, shape, computed)
        self._optimizers = {way: optimizer_of(config, self.module, way) for way in _WAYS}
        self.optimizer = self._optimizers["module"]
        self._dense = isinstance(self.optimizer.sampler, Dense)
        self.drawn: Drawn = formulas.drawn_of(self.optimizer)
        total, settings = config.train.rows, config.optimizer
        self._groups = settings.directions // settings.directions_per_row
        first, rows, self.num_forwards = busiest_rows(total, count, config.train.micro_rows, self._groups)
        self._rows = Rows(rows, length, answer, first, total)
        self._work: dict[str, Work] = {}
        self.facts = self._facts(config.model.source, length, answer)

    def planned(self, mode: Mode, cluster: Cluster, zero: Mapping[str, Any]) -> Planned:
        name, optimizer, work = (
            mode.name(self._count),
            self._optimizers[mode.perturb],
            self.work(mode.perturb),
        )
        gathers = formulas.gathers_of(mode, self.module, work.worst, zero)
        try:
            memory = formulas.memory(mode, optimizer, gathers, self.drawn, cluster.per_node)
        except ValueError as error:
            return Planned(mode=mode, name=name, refused=str(error))
        sent = formulas.traffic(mode, optimizer, gathers, work, self._count, outputs_of(self._config))
        taken = formulas.seconds(mode, optimizer, sent, work, self.drawn, cluster)
        fits = memory.total <= cluster.usable_bytes
        return Planned(mode=mode, name=name, memory=memory, traffic=sent, seconds=taken, fits=fits)

    def work(self, way: str) -> Work:
        if way not in self._work:
            self._work[way] = self._stacked() if way == "module" else self._one_by_one()
        return self._work[way]

    def _stacked(self) -> Work:
        """All probes in one forward; its worst draw is that of every arm: most scratch, no shared prefix."""
        optimizer, points = self.optimizer, 2 if self.optimizer.anchor.every else 1
        arms = tuple(range(len(optimizer.arms)))
        ones = (1.0,) * len(arms)
        every = [Draw(arms, ones, ones)] * optimizer.directions
        times, tries = self.num_forwards * points, (False, True) if optimizer.trials else (False,)
        # That of a trial has the more sides.
        of_all = [(trace_step(optimizer, every, self._rows, trial), float(times)) for trial in tries]
        worst, rounds = of_all[-1][0], times * len(tries)
        if self._dense:
            return Work(worst=worst, forwards=tuple(of_all), rounds=rounds)
        draws = [optimizer._draws(step, optimizer.directions) for step in range(_DRAWS)]
        some = tuple(
            (trace_step(optimizer, each, self._rows, trial), times / _DRAWS)
            for each in draws
            for trial in tries
        )
        return Work(worst=worst, forwards=some, rounds=rounds)

    def _one_by_one(self) -> Work:
        """A forward for each probe and micro-batch, on the rows of its group, or on one that fills in."""
        optimizer, rows = self.optimizer, self._rows
        # Of the directions of a group, which share their unshifted side.
        sides = sum(
            optimizer.directions_per_row * sum(sign != 0.0 for sign in signs) + (0.0 in signs)
            for signs in formulas.signs_of(optimizer)
        )
        times: Counter[int] = Counter()
        for micro in range(self.num_forwards):
            start = rows.first + micro * rows.count
            shares = dict(rows_of_groups(start, rows.count, rows.total, self._groups))
            for group in range(self._groups):
                times[shares.get(group, 1)] += sides
        traces: dict[int, Traced] = {
            n: trace_forward(optimizer, dataclasses.replace(rows, count=n)) for n in sorted(times)
        }
        return Work(
            worst=traces[max(traces)],
            forwards=tuple((traces[n], float(count)) for n, count in times.items()),
            rounds=sum(times.values()),
        )

    def _facts(self, source: str, length: int, answer: int) -> dict[str, Any]:
        params = dict(self.module.named_parameters(remove_duplicate=False))
        unique = {id(p): p for p in params.values()}
        settings = self._config.optimizer
        return {
            "source": source,
            "parameters": sum(p.numel() for p in unique.values()),
            "trained": sum(p.numel for p in self.optimizer.params),
            "tied": len(params) > len(unique),
            "layers": len(find_layers(self.module)),
            "arms": len(self.optimizer.arms),
            "dtype": self._config.model.dtype,
            "compute_dtype": self._config.engine.compute_dtype,
            "rows": self._config.train.rows,
            "rows_of_a_forward": self._rows.count,
            "forwards": self.num_forwards,
            "length": length,
            "answer": answer,
            "directions": settings.directions,
            "sampler": settings.sampler.name,
            "drawn_share": self.drawn.share,
            "rule": settings.rule.name,
            "rounding": settings.rounding,
            "flops": int(sum(t.flops * times for t, times in self.work("module").forwards)),
        }


def unfilled(config: Config, shape: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape, dtype=dtype, trust_remote_code=config.model.trust_remote_code
        )
    freeze(model, config.model.parameters)
    return model.eval()


def optimizer_of(config: Config, module: nn.Module, way: Perturb) -> ZeroOrder:
    """`train.build_optimizer` for a model without values, which a mask and the start-up check would read."""
    from zo_dist.train import build_optimizer

    settings = dataclasses.replace(config.optimizer, perturb=way, mask=None, self_check=False, compile=False)
    optimizer = build_optimizer(dataclasses.replace(config, optimizer=settings), module)
    if config.optimizer.mask is not None:
        _mask_shapes(optimizer, config.optimizer.mask)
    return optimizer


def _mask_shapes(optimizer: ZeroOrder, mask: SmallWeights) -> None:
    """Which parameters a mask cuts is told by their shapes; where it cuts them, by values."""
    if mask.share < 1.0:
        cut = [p.name for p in optimizer.params if len(p.shape) > 1 and p.numel]
        optimizer.mask.thresholds = dict.fromkeys(cut, 1.0)


def _assumed(cluster: Cluster, subject: _Subject, length: int, answer: int) -> tuple[str, ...]:
    taken = cluster.assumptions
    told = [
        f"figures of {cluster.kind}: {cluster.gpu.source}",
        f"reached of them: compute {taken.compute:g}, hbm {taken.hbm:g}, links {taken.links:g}; "
        f"{taken.latency_us:g} us for each collective",
        f"of a GPU's {cluster.gpu.memory_gb:g} GB, {taken.reserve_gb:g} GB stay free; what is planned takes "
        f"{taken.fragmentation:.0%} more than it is (fragmentation)",
        f"a row is one sequence of {length} tokens, {answer} of the answer; some rows are padded",
        "attention stores no scores (a fused kernel); other kernels are torch's own, none is compiled away",
    ]
    if subject.optimizer.mask.thresholds:
        told.append("a mask's pieces are small: they are not counted, nor are its passes")
    if not subject._dense:
        told.append(f"memory is that of a draw of all arms; seconds are a mean over {_DRAWS} first draws")
    if any(
        isinstance(m, nn.Module) and "experts" in type(m).__name__.lower() for m in subject.module.modules()
    ):
        told.append("experts: all of a layer's are gathered, and tokens fall on them evenly")
    return tuple(told)
