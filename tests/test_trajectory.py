"""The log of a run: every bit of it counts, and what it says is what the run did."""

from __future__ import annotations

import itertools
import logging
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from hypothesis import given
from hypothesis import strategies as st
from injected import files_no_longer_than
from models import build, loss_of, rows_for
from reference import Reference
from tiny_run import launch, result_of, write_config, write_model
from workers import digest, needs_deepspeed, whole_weights

import zo_dist
from zo_dist import native
from zo_dist.cli import main
from zo_dist.engines.agreement import fingerprint
from zo_dist.noise import Noise
from zo_dist.replay import identity, replay
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryReader, TrajectoryWriter

NUM_ARMS = 34
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def step_records(draw: Any) -> StepRecord:
    num_directions = draw(st.integers(0, 5))
    arms = [
        tuple(sorted(draw(st.sets(st.integers(0, NUM_ARMS - 1), min_size=1)))) for _ in range(num_directions)
    ]
    coef = st.floats(width=32, allow_nan=False, allow_infinity=False)
    weights = []
    for a in arms:
        # Few values for many arms, as clipped weights are, or a value for each; some beyond a float16.
        weight = st.floats(width=draw(st.sampled_from([16, 32])), allow_nan=False, allow_infinity=False)
        few = draw(st.lists(weight, min_size=1, max_size=NUM_ARMS))
        weights.append(tuple(draw(st.lists(st.sampled_from(few), min_size=len(a), max_size=len(a)))))
    coefs = draw(st.lists(coef, min_size=num_directions, max_size=num_directions))
    slopes = draw(st.lists(FINITE, min_size=num_directions, max_size=num_directions))
    losses = (draw(FINITE), draw(FINITE)) if slopes else ()
    head = draw(st.integers(0, 2**63)), draw(FINITE)
    curvatures = draw(st.sampled_from([[], [(draw(coef), draw(coef)) for _ in arms]]))
    of_directions = map(tuple, (slopes, arms, coefs, weights))
    return StepRecord(*head, *of_directions, losses, tuple(curvatures))


@given(step_records())
def test_a_record_is_read_as_it_was_written(record: StepRecord) -> None:
    again = StepRecord.unpack(record.pack(NUM_ARMS), NUM_ARMS)
    assert again == record
    # Equal is not enough: 0.0 equals -0.0.
    assert repr(again) == repr(record)


def written(path: Path, steps: int = 6, num_arms: int = NUM_ARMS) -> list[StepRecord]:
    """A log of random steps, one of them skipped, and what is in it."""
    draw = random.Random(0)
    records = []
    for step in range(steps):
        arms = [tuple(sorted(draw.sample(range(num_arms), 6))) for _ in range(0 if step == 3 else 2)]
        weights = [tuple(torch.rand(6).tolist() if i else [0.25] * 6) for i in range(len(arms))]
        slopes = tuple(draw.gauss(0, 1) for _ in arms)
        of_directions = slopes, tuple(arms), tuple(2.0 for _ in arms), tuple(weights)
        records.append(StepRecord(step, 1e-4, *of_directions, (0.5, 0.25) if slopes else ()))
    with TrajectoryWriter(path, {"arms": [f"layer {i}" for i in range(num_arms)], "seed": 3}) as log:
        for record in records:
            log.append(record)
    return records


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = written(tmp_path / "log")
    reader = TrajectoryReader(tmp_path / "log")
    assert reader.header["seed"] == 3
    assert list(reader) == records
    assert list(reader) == records, "a second reading begins again"
    assert reader.end == (tmp_path / "log").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_any_byte_that_is_changed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path)
    whole = path.read_bytes()
    changes = [(at, 1 << bit) for at in range(len(whole)) for bit in (0, 3, 7)]
    assert len(changes) > 1000
    for at, change in changes:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        with pytest.raises(TrajectoryError, match=r"offset|begins otherwise"):
            list(TrajectoryReader(path))


def test_a_log_that_is_cut_anywhere_gives_its_whole_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    records = written(path)
    whole, ends = path.read_bytes(), [TrajectoryReader(path).end]
    reader = TrajectoryReader(path)
    ends += [reader.end for _ in reader]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < ends[0]:
            with pytest.raises(TrajectoryError):
                TrajectoryReader(path)
            continue
        caplog.clear()
        expected = sum(end <= size for end in ends[1:])
        reader = TrajectoryReader(path)
        assert list(reader) == records[:expected]
        torn = size - ends[expected]
        assert (reader.end, reader.torn) == (ends[expected], torn)
        assert [r.levelno for r in caplog.records] == ([logging.WARNING] if torn else [])


def test_a_step_that_is_missing_or_there_twice_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with TrajectoryWriter(path, {"arms": []}) as log:
        for step in range(3):
            log.append(StepRecord(step, 0.1))
        for step in (2, 4):
            with pytest.raises(ValueError, match=f"has 3 steps; step {step} cannot follow"):
                log.append(StepRecord(step, 0.1))
    whole, reader = path.read_bytes(), TrajectoryReader(path)
    ends = [reader.end, *(reader.end for _ in reader)]
    pieces = [whole[start:end] for start, end in itertools.pairwise(ends)]
    for steps in ([0, 2], [0, 1, 1], [1]):
        path.write_bytes(whole[: ends[0]] + b"".join(pieces[step] for step in steps))
        with pytest.raises(TrajectoryError, match=r"step \d follows where step \d should"):
            list(TrajectoryReader(path))


def test_files_that_are_no_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="cannot be read: No such file"):
        TrajectoryReader(tmp_path / "none")
    (tmp_path / "other").write_text("a text")
    with pytest.raises(TrajectoryError, match="begins otherwise"):
        TrajectoryReader(tmp_path / "other")
    TrajectoryWriter(tmp_path / "log", {"arms": [], "version": 7}).close()
    with pytest.raises(TrajectoryError, match="version 7"):
        TrajectoryReader(tmp_path / "log")


def test_a_full_disk_takes_no_part_of_a_record(tmp_path: Path) -> None:
    record = StepRecord(0, 0.1, (1.0,), ((0,),), (2.0,), ((1.0,),), (0.5, 0.25))
    with TrajectoryWriter(tmp_path / "log", {"arms": ["one"]}) as log:
        log.append(record)
        size = (tmp_path / "log").stat().st_size
        with files_no_longer_than(size + 10), pytest.raises(OSError, match=r"could be written|too large"):
            log.append(StepRecord(1, 0.1, (1.0,), ((0,),), (2.0,), ((1.0,),), (0.5, 0.25)))
        assert (tmp_path / "log").stat().st_size == size
        with files_no_longer_than(size + 10), pytest.raises(OSError, match=r"could be written|too large"):
            log.append(StepRecord(1, 0.1, (1.0,), ((0,),), (2.0,), ((1.0,),), (0.5, 0.25)))
        assert (tmp_path / "log").stat().st_size == size
        log.append(StepRecord(1, 0.1))
    assert [r.step for r in TrajectoryReader(tmp_path / "log")] == [0, 1]


def test_a_log_goes_on_after_its_last_whole_record(tmp_path: Path) -> None:
    records = written(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-3])
    reader = TrajectoryReader(tmp_path / "log")
    with pytest.raises(ValueError, match="read to its end"):
        TrajectoryWriter.resume(reader)
    assert list(reader) == records[:-1]
    with TrajectoryWriter.resume(reader) as log:
        log.append(records[-1])
    assert (tmp_path / "log").read_bytes() == whole


@pytest.mark.parametrize(
    ("distinct", "size", "in_float32"),
    [
        *((1, 2, 4), (2, 2 * 2 + 38, 4 * 2 + 38), (127, 2 * 127 + 263, 4 * 127 + 263)),
        *((128, 2 * 300, 4 * 300), (300, 2 * 300, 4 * 300)),
    ],
)
def test_a_weight_that_several_arms_have_is_stored_once(distinct: int, size: int, in_float32: int) -> None:
    arms = tuple(range(300))
    for unit, expected in ((1.0, size), (2.0**-30, in_float32)):
        record = one_direction(arms, tuple(unit * (1 + arm % distinct) for arm in arms))
        data = record.pack(300)
        assert len(data) == 35 + 13 + 38 + expected
        assert StepRecord.unpack(data, 300) == record


def one_direction(arms: tuple[int, ...], weights: tuple[float, ...]) -> StepRecord:
    return StepRecord(0, 0.1, (1.0,), (arms,), (0.5,), (weights,), (0.5, 0.25))


@pytest.mark.parametrize(
    ("weights", "bits"), [((4.0, 1.23456789), 11), ((4.0, 1e-6), 24), ((4.0, 123456.789), 24)]
)
def test_weights_are_rounded_to_what_the_log_has_room_for(weights: tuple[float, ...], bits: int) -> None:
    draw = zo_dist.samplers.Draw((0, 1), weights, (1.0, 1.0))
    record = StepRecord.of(0, 0.1, [draw], [2.0], [0.1], (0.5, 0.25))
    for got, wanted in zip(record.weights[0], weights, strict=True):
        assert abs(got / wanted - 1.0) <= 0.5**bits
    coef = float(torch.tensor(0.1))
    assert record.coefs == (coef,)
    assert record.scales[0] == tuple(float(torch.tensor(coef * w)) for w in record.weights[0])


def test_a_curvature_takes_8_bytes_of_its_direction_and_none_where_there_is_none() -> None:
    draws = [_bound().draw(0, direction) for direction in range(3)]
    told: Any = 0, 0.1, draws, [1.0] * 3, [2.0] * 3, (0.5, 0.25)
    plain, curved = StepRecord.of(*told), StepRecord.of(*told, [(0.1, 2.0)] * 3)
    assert len(curved.pack(4)) == len(plain.pack(4)) + 3 * 8
    # As it is logged: in float32.
    assert curved.curvatures[0] == (float(torch.tensor(0.1)), 2.0)
    for bytes_too_many in (1, 8, 16, 32):
        with pytest.raises((ValueError, struct.error)):
            StepRecord.unpack(plain.pack(4) + bytes(bytes_too_many), 4)


def _bound() -> zo_dist.Dense:
    sampler = zo_dist.Dense()
    sampler.bind([1] * 4, Noise("rademacher", 0))
    return sampler


def test_an_index_of_no_weight_is_found() -> None:
    data = one_direction(tuple(range(9)), (1.0, 2.0, 3.0) * 3).pack(9)
    with pytest.raises(IndexError):
        StepRecord.unpack(data[:-1] + b"\x03", 9)


@pytest.mark.parametrize("num_arms", [34, 82, 128])
@pytest.mark.parametrize("sampler", ["dense", "uniform", "adalezo", "unclipped", "fitted"])
def test_a_direction_takes_less_than_64_bytes(sampler: str, num_arms: int) -> None:
    """Of a model with 32, 80 or 126 layers, at the published settings, after the sampler has learnt."""
    chosen: dict[str, zo_dist.Sampler] = {
        "dense": zo_dist.Dense(),
        "uniform": zo_dist.Uniform(),
        "adalezo": zo_dist.AdaLeZO(),
        "unclipped": zo_dist.AdaLeZO(clip=math.inf),
        "fitted": zo_dist.FittedAdaLeZO(),
    }
    drawn_from = chosen[sampler]
    drawn_from.bind([1] * num_arms, Noise("rademacher", 0, compile=False))
    numbers, sizes, steps = random.Random(0), [], 20 if sampler == "fitted" else 400
    # How long the arms' gradients are: one in twenty is ten times shorter than another in twenty.
    lengths = [numbers.lognormvariate(0, 0.7) for _ in range(num_arms)]
    for step in range(steps):
        draws = [drawn_from.draw(step, direction) for direction in range(4)]
        slopes = [sum(numbers.gauss(0, lengths[arm]) for arm in draw.arms) for draw in draws]
        for draw, slope in zip(draws, slopes, strict=True):
            record = StepRecord.of(step, 1e-4, [draw], [slope], [slope / 4], (0.5, 0.25))
            sizes += [len(record.pack(num_arms)) - len(StepRecord(step, 1e-4).pack(num_arms)) - 16]
        drawn_from.observe(draws, slopes)
    learnt = sizes[2 * steps :]
    mean, most = sum(learnt) / len(learnt), max(learnt)
    print(f"{sampler}, {num_arms} arms: {mean:.1f} bytes, at most {most}")
    # At most as many arms as there are draws, of weights that all differ: below 64 up to 96 arms.
    assert most <= 13 + -(-num_arms // 8) + 2 * int(0.2 * num_arms)
    assert most < 64 or (sampler, num_arms) == ("unclipped", 128)


# What a log rebuilds


def make(**options: Any) -> zo_dist.ZeroOrder:
    dtype = table.dtype_of(options.pop("dtype", "float32"))
    options = {"weight_decay": 0.01, "lr": 0.03, **options}
    return table.optimizer(build("sequential", dtype), self_check=False, **options)


def nan_in_step(number: int) -> Any:
    """The model's loss, but for one step in which it is no number."""
    calls = iter(range(1000))
    return lambda model, batch: loss_of(model, batch) + (math.nan if next(calls) == number else 0.0)


def run_and_log(path: Path, steps: int, **options: Any) -> zo_dist.ZeroOrder:
    optimizer = make(**options)
    dtype = optimizer.params[0].param.dtype
    batch, loss = rows_for("sequential", 6, dtype=dtype), nan_in_step(4)
    with TrajectoryWriter(path, identity(optimizer)) as log:
        for _ in range(steps):
            optimizer.step_batch(batch, loss)
            log.append(optimizer.record)
    return optimizer


COMBINATIONS = table.all_pairs(
    table.WRITES,
    tuple(table.RULES),
    tuple(table.COEFFICIENTS),
    tuple(table.SAMPLERS),
    tuple(table.ESTIMATORS),
    tuple(table.NOISES),
    table.DIRECTIONS[:3],
    tuple(table.MASKS),
    tuple(table.BESIDES),
)


@pytest.mark.parametrize("row", COMBINATIONS, ids=str)
def test_replay_gives_the_weights_and_the_state_of_the_run(tmp_path: Path, row: tuple[Any, ...]) -> None:
    (dtype, rounding), rule, coefficients, sampler, estimator, law, directions, mask, besides = row
    estimator = table.estimator_for(sampler, estimator)
    options: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "sampler": sampler, "noise": law}
    options.update(
        estimator=estimator,
        directions=directions,
        rule=rule,
        coefficients=coefficients,
        mask=mask,
        **table.BESIDES[besides],
    )
    # Momentum diverges at more, in 20 steps to what is no number.
    options["lr"] = 0.01
    ran = run_and_log(tmp_path / "log", 20, **options)
    assert ran.skipped == 1
    again = make(**options)
    start = digest(whole_weights(again))
    assert replay(again, tmp_path / "log") == 20
    assert digest(whole_weights(again)) == digest(whole_weights(ran)) != start
    assert repr(again.state_dict()) == repr(ran.state_dict())
    # Both go on as one.
    batch = rows_for("sequential", 6, dtype=ran.params[0].param.dtype)
    assert ran.step_batch(batch, loss_of) == again.step_batch(batch, loss_of)
    assert digest(whole_weights(again)) == digest(whole_weights(ran))


def raising_in(calls: set[int], **options: Any) -> tuple[list[StepRecord], str]:
    """Five steps, each taken again if an error came out of its loss, and the weights after them."""
    optimizer, count, records = make(**options), itertools.count(), []
    dtype = optimizer.params[0].param.dtype

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = loss_of(model, batch)
        if next(count) in calls:
            raise MemoryError
        return losses

    while len(records) < 5:
        try:
            optimizer.step_batch(rows_for("sequential", 6, seed=len(records), dtype=dtype), loss)
        except MemoryError:
            continue
        records.append(optimizer.record)
    return records, digest(whole_weights(optimizer))


@pytest.mark.parametrize("perturb", ["module", "shard"])
def test_a_step_whose_loss_raised_an_error_can_be_taken_again(tmp_path: Path, perturb: str) -> None:
    """Its number, arms and noise too; so the log has no gap."""
    options = {"perturb": perturb, "sampler": "adalezo", "rule": "momentum"}
    records, weights = raising_in({1, 5, 6}, **options)
    assert (records, weights) == raising_in(set(), **options)
    assert [record.step for record in records] == list(range(5))


def test_replay_equals_a_slow_rebuilding_by_hand(tmp_path: Path) -> None:
    ran = run_and_log(tmp_path / "log", 20, sampler="adalezo", directions=2)
    arms = tuple(tuple(p.name for p in arm.params) for arm in ran.arms)
    reference = Reference(build("sequential"), arms, "adalezo", lr=0.0, eps=1e-3, weight_decay=0.01)
    for record in TrajectoryReader(tmp_path / "log"):
        reference.step_number, reference.lr = record.step, record.lr
        for arm, terms in record.terms.items():
            for name in arms[arm]:
                reference.write(name, terms)
    assert digest(reference.weights()) == digest(whole_weights(ran))


def test_replay_stops_where_it_is_told(tmp_path: Path) -> None:
    run_and_log(tmp_path / "log", 20)
    seven, half = run_and_log(tmp_path / "short", 7), make()
    assert replay(half, tmp_path / "log", 7) == 7
    assert digest(whole_weights(half)) == digest(whole_weights(seven))
    with pytest.raises(TrajectoryError, match="has 20 steps; 21 were asked for"):
        replay(make(), tmp_path / "log", 21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 1 here, but was 0"),
        ({"noise": "gaussian"}, "noise is 'gaussian, version"),
        ({"rounding": "kahan"}, "rounding is 'kahan' here, but was 'stochastic'"),
        ({"mask": "small"}, r"mask is \['Mask', {'share': 0.4}\] here, but was \['Mask', {'share': 1.0}\]"),
        ({"sampler": "uniform"}, "sampler is .*Uniform.* here"),
        ({"dtype": "bfloat16"}, "other names, shapes or dtypes"),
        ({"arms": "weight$"}, "other layers, or the setting arms is another"),
    ],
)
def test_a_log_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run_and_log(tmp_path / "log", 2)
    other = make(**change)
    before = digest(whole_weights(other))
    with pytest.raises(TrajectoryError, match=message):
        replay(other, tmp_path / "log")
    assert digest(whole_weights(other)) == before


def test_a_single_bit_of_the_starting_weights_counts(tmp_path: Path) -> None:
    run_and_log(tmp_path / "log", 2)
    other = make()
    weight = other.params[-1].param.data.view(torch.int32)
    weight.view(-1)[-1] ^= 1
    with pytest.raises(TrajectoryError, match="not those that the run started from"):
        replay(other, tmp_path / "log")


def test_frozen_weights_count_too(tmp_path: Path) -> None:
    def frozen() -> zo_dist.ZeroOrder:
        model = build("sequential")
        next(model.parameters()).requires_grad_(False)
        return zo_dist.ZeroOrder(model, self_check=False)

    optimizer = frozen()
    TrajectoryWriter(tmp_path / "log", identity(optimizer)).close()
    assert replay(frozen(), tmp_path / "log") == 0
    next(optimizer.engine.module.parameters()).data[0, 0] += 1
    with pytest.raises(TrajectoryError, match="frozen weights are not those"):
        replay(optimizer, tmp_path / "log")


def test_damage_in_the_last_record_stops_replay_before_the_first_write(tmp_path: Path) -> None:
    run_and_log(tmp_path / "log", 20)
    data = bytearray((tmp_path / "log").read_bytes())
    data[-6] ^= 4
    (tmp_path / "log").write_bytes(data)
    other = make()
    before = digest(whole_weights(other))
    with pytest.raises(TrajectoryError, match="damaged at offset"):
        replay(other, tmp_path / "log")
    assert digest(whole_weights(other)) == before


def test_records_that_do_not_fit_are_refused() -> None:
    optimizer = make(sampler="adalezo")
    with pytest.raises(TrajectoryError, match="the next is step 0"):
        optimizer.replay(StepRecord(1, 0.1))
    optimizer.replay(StepRecord(0, 0.1))
    with pytest.raises(TrajectoryError, match="drew other arms"):
        optimizer.replay(StepRecord(1, 0.1, (1.0,), ((0, 1, 2, 3, 4),), (1.0,), ((1.0,) * 5,), (0.5, 0.25)))


def test_an_optimizer_that_has_stepped_is_refused(tmp_path: Path) -> None:
    # A learning rate of 0: its weights are still those of the start.
    run_and_log(tmp_path / "log", 2)
    used = make()
    used.param_groups[0]["lr"] = 0.0
    used.step_batch(rows_for("sequential", 6), loss_of)
    with pytest.raises(TrajectoryError, match="has taken 1 steps"):
        replay(used, tmp_path / "log")


def test_fingerprints_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        values = torch.linspace(-3, 3, 1001).to(dtype)
        integers = values.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        )
        by_hand = sum(x * (2 * i + 1) for i, x in enumerate(integers.tolist(), start=77)) % 2**64
        assert fingerprint(values, 77) == by_hand
        assert (fingerprint(values[:400], 77) + fingerprint(values[400:], 477)) % 2**64 == by_hand
        assert fingerprint(values[:0], 5) == 0
        with monkeypatch.context() as context:
            context.setattr(native, "library", lambda: None)
            assert fingerprint(values, 77) == by_hand


# The command


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps in bfloat16 by one process."""
    folder = tmp_path_factory.mktemp("logged")
    sections = {"model": {"dtype": "bfloat16"}, "train": {"steps": 12, "eval_every": 0}}
    sampler = {"sampler": {"name": "adalezo", "ratio": 0.6}, "weight_decay": 0.01}
    assert main(["train", str(write_config(folder, optimizer=sampler, **sections))]) == 0
    return folder


def weights_in(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_command_rebuilds_the_saved_weights(logged: Path, tmp_path: Path) -> None:
    log, base = logged / "run" / "trajectory.zo", logged / "model"
    assert main(["replay", str(base), str(log), "--to", str(tmp_path / "out")]) == 0
    assert weights_in(tmp_path / "out") == weights_in(logged / "run" / "last")
    assert main(["replay", str(base), str(log), "--to", str(tmp_path / "five"), "--step", "5"]) == 0
    assert weights_in(tmp_path / "five") != weights_in(tmp_path / "out")


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_command_rebuilds_on_another_engine_and_number_of_ranks(
    logged: Path, tmp_path: Path, engine: str
) -> None:
    configs = Path(__file__).parent.parent / "configs"
    more = ["--deepspeed", str(configs / "ds_zero3.json")] if engine == "zero3" else ["engine.kind=fsdp2"]
    log = logged / "run" / "trajectory.zo"
    done = launch(["replay", str(logged / "model"), str(log), "--to", str(tmp_path / "out"), *more])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (result_of(done.stdout)["steps"], result_of(done.stdout)["ranks"]) == (12, 2)
    assert weights_in(tmp_path / "out") == weights_in(logged / "run" / "last")


def test_the_command_says_what_is_wrong(
    logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(logged / "run" / "trajectory.zo")
    other = str(write_model(tmp_path / "other", tied=False))
    cases = [
        (["replay", other, log], "other names, shapes or dtypes"),
        (["replay", str(logged / "run" / "last"), log], "not those that the run started from"),
        (["replay", str(logged / "model"), str(tmp_path / "none")], "cannot be read"),
        (["replay", str(logged / "model"), log, "--step", "13"], "has 12 steps; 13 were asked for"),
        (["replay", str(logged / "model"), log, "--step", "-1"], "at least 0"),
    ]
    for args, message in cases:
        assert main([*args, "--to", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_exports_its_model_after_any_step(
    logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_ranks: int
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    path = logged / "config.yaml"
    options = [f"train.output={run}", "train.snapshot_every=4", "train.keep_snapshots=9", "engine.kind=auto"]
    assert main(["train", str(path), *options]) == 0
    for step, snapshot in ((None, 12), (11, 8), (8, 8), (3, None)):
        asked = ["--to", str(out)] + ([] if step is None else ["--step", str(step)])
        capsys.readouterr()
        if num_ranks == 1:
            assert main(["export", str(run), *asked]) == 0
            result = result_of(capsys.readouterr().out)
        else:
            done = launch(["export", str(run), *asked])
            assert done.returncode == 0, done.stderr[-3000:]
            result = result_of(done.stdout)
        assert (result["steps"], result["ranks"]) == (step or 12, num_ranks)
        expected = str(run / "snapshots" / f"step-{snapshot:08}") if snapshot else None
        assert result.get("snapshot") == expected
        again = [
            "replay",
            str(logged / "model"),
            str(run / "trajectory.zo"),
            "--to",
            str(tmp_path / "replayed"),
        ]
        assert main([*again, "--step", str(step or 12)]) == 0
        assert weights_in(out) == weights_in(tmp_path / "replayed")
        if num_ranks > 1:
            break
    assert main(["check", str(out)]) == 0
    assert main(["export", str(run), "--to", str(out), "--step", "13"]) == 2
    assert "has 12 steps; 13 were asked for" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--to", str(out)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_sharded_run_is_rebuilt_by_one_process(logged: Path, tmp_path: Path) -> None:
    done = launch(
        ["train", str(logged / "config.yaml"), f"train.output={tmp_path / 'run'}", "engine.kind=fsdp2"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "run" / "last")
