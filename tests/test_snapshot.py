"""Snapshots: read by any engine and number of ranks, and never if a byte of them is wrong."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import files_no_longer_than, remembered_noise
from models import build, loss_of, rows_for
from tiny_run import write_config
from workers import Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist import snapshot
from zo_dist.cli import main
from zo_dist.replay import identity, replay
from zo_dist.runlog import read_metrics
from zo_dist.snapshot import PendingSnapshot, SnapshotError, load_snapshot, save_snapshot, snapshots_in
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryReader, TrajectoryWriter

PLACES = [
    ("replicated", 1),
    ("replicated", 2),
    ("fsdp2", 1),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("hsdp_2x2", 4),
    *(pytest.param(*case, marks=needs_deepspeed) for case in (("zero3", 2), ("zero3", 3), ("zero3_2x2", 4))),
]


def make(engine: str = "replicated", **options: Any) -> zo_dist.ZeroOrder:
    model = wrap(engine, build("sequential", torch.bfloat16))
    settings: dict[str, Any] = {"sampler": "adalezo", "lr": 0.03, "rounding": "kahan", "directions": 2}
    return table.optimizer(model, self_check=False, **{**settings, **options})


def stepped(engine: str = "replicated", steps: int = 4, **options: Any) -> zo_dist.ZeroOrder:
    optimizer, batch = make(engine, **options), rows_for("sequential", 6, dtype=torch.bfloat16)
    for _ in range(steps):
        # Every rank has all rows: what a step does need not be the same on other numbers of ranks here.
        optimizer.step_batch(batch, loss_of)
    return optimizer


Pieces = list[tuple[str, int, list[float]]]


def lost_of(optimizer: zo_dist.ZeroOrder) -> Pieces:
    """What rounding lost in the spans of this rank: (name, offset, values)."""
    spans = optimizer.engine.spans(optimizer.params)
    return [(s.name, s.offset, optimizer.rounding.lost[s.name].tolist()) for s in spans]


def joined(ranks: list[Pieces]) -> dict[str, list[float]]:
    """Whole tensors from the pieces of all ranks."""
    whole: dict[str, dict[int, float]] = {}
    for name, offset, values in (piece for pieces in ranks for piece in pieces):
        whole.setdefault(name, {}).update(enumerate(values, offset))
    return {name: [values[i] for i in range(len(values))] for name, values in whole.items()}


def save_there(engine: str, folder: str) -> tuple[str, str, int, Pieces]:
    with remembered_noise():
        optimizer = stepped(engine)
        save_snapshot(optimizer, folder)
        return what_is(optimizer)


def load_there(engine: str, path: str) -> tuple[str, str, int, Pieces]:
    optimizer = make(engine)
    load_snapshot(optimizer, path)
    return what_is(optimizer)


def what_is(optimizer: zo_dist.ZeroOrder) -> tuple[str, str, int, Pieces]:
    weights, sampler = digest(whole_weights(optimizer)), repr(optimizer.sampler.state_dict())
    return weights, sampler, optimizer.step_count, lost_of(optimizer)


@pytest.fixture(scope="module")
def saved(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Snapshots by one process and by three FSDP2 ranks: path, and what each rank had."""
    made = {}
    for engine, num_ranks in (("replicated", 1), ("fsdp2", 3)):
        folder = tmp_path_factory.mktemp("saved")
        results = pool(num_ranks).run(save_there, engine, str(folder))
        made[engine] = (str(folder / "step-00000004"), results)
    return made


@pytest.mark.parametrize("source", ["replicated", "fsdp2"])
@pytest.mark.parametrize(("engine", "num_ranks"), PLACES)
def test_any_engine_loads_what_another_saved(
    pool: Callable[[int], Pool], saved: dict[str, Any], engine: str, num_ranks: int, source: str
) -> None:
    path, expected = saved[source]
    results = pool(num_ranks).run(load_there, engine, path)
    for got in results:
        assert got[:3] == expected[0][:3]
    lost = joined([got[3] for got in results])
    assert lost == joined([had[3] for had in expected])
    assert any(any(values) for values in lost.values())


def sides_of(optimizer: zo_dist.ZeroOrder) -> Pieces:
    """What momentum this rank keeps: of matrices some rows of one side, which other ranks may keep too."""
    kept, places = optimizer.beside["factored_momentum"], optimizer.rule.places
    return [(name, places[name][0], tensor.tolist()) for name, tensor in kept.items()]


def save_sides(engine: str, folder: str) -> tuple[str, Pieces, list[StepRecord]]:
    """A run whose momentum is kept in sides: that of four steps, and three more, of which one refreshes."""
    with remembered_noise():
        optimizer = stepped(engine, rule="lozo_m", noise="lozo")
        save_snapshot(optimizer, folder)
        pieces, records = sides_of(optimizer), []
        for _ in range(3):
            optimizer.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
            records.append(optimizer.record)
        return digest(whole_weights(optimizer)), pieces, records


def load_sides(engine: str, path: str, records: list[StepRecord]) -> tuple[str, Pieces]:
    optimizer = make(engine, rule="lozo_m", noise="lozo")
    load_snapshot(optimizer, path)
    pieces = sides_of(optimizer)
    for record in records:
        optimizer.replay(record)
    return digest(whole_weights(optimizer)), pieces


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("replicated", 1), ("fsdp2", 3)),
        (("fsdp2", 3), ("replicated", 1)),
        pytest.param(("zero3", 3), ("replicated", 1), marks=needs_deepspeed),
        pytest.param(("zero3", 3), ("zero3", 2), marks=needs_deepspeed),
        pytest.param(("zero3", 2), ("fsdp2", 3), marks=needs_deepspeed),
    ],
    ids=str,
)
def test_momentum_in_sides_is_read_by_any_engine(
    pool: Callable[[int], Pool], tmp_path: Path, source: tuple[str, int], target: tuple[str, int]
) -> None:
    """ZeRO-3 cuts within rows, and both of their ranks keep what goes with such a row."""
    saved = pool(source[1]).run(save_sides, source[0], str(tmp_path))
    after, _, records = saved[0]
    loaded = pool(target[1]).run(load_sides, target[0], str(tmp_path / "step-00000004"), records)
    whole = joined([pieces for _, pieces, _ in saved])
    assert any(any(values) for values in whole.values())
    for digest_after, pieces, *_ in [*saved, *loaded]:
        assert digest_after == after
        for name, offset, values in pieces:
            assert values == whole[name][offset : offset + len(values)]


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"sampler": "dense"}], ids=str)
def test_both_go_on_as_one(tmp_path: Path, options: dict[str, Any]) -> None:
    ran = stepped(**options)
    again = make(**options)
    load_snapshot(again, save_snapshot(ran, tmp_path))
    assert repr(again.state_dict()) == repr(ran.state_dict())
    batch = rows_for("sequential", 6, dtype=torch.bfloat16)
    for _ in range(5):
        assert ran.step_batch(batch, loss_of) == again.step_batch(batch, loss_of)
    assert digest(whole_weights(again)) == digest(whole_weights(ran))
    assert lost_of(again) == lost_of(ran) if "rounding" not in options else not ran.rounding.lost


def logged(log: Path, steps: int, saved: int, folder: Path) -> zo_dist.ZeroOrder:
    """An optimizer after so many steps in a log, with a snapshot of the first `saved` in the folder."""
    optimizer, batch = make(), rows_for("sequential", 6, dtype=torch.bfloat16)
    with TrajectoryWriter(log, identity(optimizer)) as writer:
        for _ in range(steps):
            optimizer.step_batch(batch, loss_of)
            writer.append(optimizer.record)
            if optimizer.step_count == saved:
                save_snapshot(optimizer, folder)
    return optimizer


def test_a_snapshot_stands_for_the_steps_before_it(tmp_path: Path) -> None:
    optimizer = logged(tmp_path / "log", 9, 6, tmp_path)
    again, replayed = make(), []
    original = again.replay
    again.replay = lambda record: (replayed.append(record.step), original(record))[1]  # type: ignore[method-assign]
    assert replay(again, tmp_path / "log", snapshot=tmp_path / "step-00000006") == 9
    assert replayed == [6, 7, 8]
    assert digest(whole_weights(again)) == digest(whole_weights(optimizer))
    assert repr(again.state_dict()) == repr(optimizer.state_dict())


def test_a_snapshot_that_is_loaded_can_be_saved_again(tmp_path: Path) -> None:
    """Also after going back to it, as for the best model: it is tied to the step that it is of."""
    optimizer = logged(tmp_path / "log", 6, 4, tmp_path / "first")
    fresh = make()
    for number, one in enumerate((fresh, optimizer)):
        load_snapshot(one, tmp_path / "first" / "step-00000004")
        again = save_snapshot(one, tmp_path / str(number))
        assert replay(make(), tmp_path / "log", snapshot=again) == 6
    # A step of its own afterwards has a record of its own.
    fresh.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
    assert replay(make(), tmp_path / "log", 5, snapshot=save_snapshot(fresh, tmp_path / "own")) == 5


def test_a_snapshot_that_is_not_of_the_log_is_refused(tmp_path: Path) -> None:
    batch = rows_for("sequential", 6, dtype=torch.bfloat16)
    for name, lr in (("a", 0.03), ("b", 0.02)):
        optimizer = make(lr=lr)
        with TrajectoryWriter(tmp_path / f"{name}.log", identity(optimizer)) as log:
            for _ in range(4):
                optimizer.step_batch(batch, loss_of)
                log.append(optimizer.record)
        save_snapshot(optimizer, tmp_path / name)
    for path, steps in (("b", None), ("a", 3)):
        with pytest.raises(TrajectoryError, match="is not of the first"):
            replay(make(), tmp_path / "a.log", steps, tmp_path / path / "step-00000004")
    assert replay(make(), tmp_path / "a.log", snapshot=tmp_path / "a" / "step-00000004") == 4


def test_any_byte_that_is_changed_is_found(tmp_path: Path) -> None:
    path = save_snapshot(stepped(), tmp_path)
    other = make()
    before, checked = digest(whole_weights(other)), 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 600)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(SnapshotError, match="damaged"):
                load_snapshot(other, path)
            checked += 1
        file.write_bytes(whole)
    assert checked > 1000
    assert digest(whole_weights(other)) == before, "nothing was written"
    load_snapshot(other, path)


def test_what_is_missing_or_of_another_run_is_said(tmp_path: Path) -> None:
    path = save_snapshot(stepped(), tmp_path)
    with pytest.raises(SnapshotError, match="another rounding mode"):
        load_snapshot(make(), save_snapshot(stepped(rounding="nearest"), tmp_path / "nearest"))
    with pytest.raises(SnapshotError, match="is no snapshot"):
        load_snapshot(make(), tmp_path)
    (path / "rank-00000.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"rank-00000.safetensors is missing; delete"):
        load_snapshot(make(), path)


def test_the_newest_are_kept_and_unfinished_ones_are_none(tmp_path: Path) -> None:
    optimizer = make()
    for _ in range(4):
        optimizer.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
        save_snapshot(optimizer, tmp_path, keep=2)
    assert [path.name for path in snapshots_in(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list(tmp_path.iterdir())) == 2
    # What a process leaves that is killed while it writes or deletes one.
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".step-00000009.partial")
    assert len(snapshots_in(tmp_path)) == 2
    save_snapshot(optimizer, tmp_path, keep=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_snapshot_before_the_first_step_stands_for_none(tmp_path: Path) -> None:
    optimizer = make()
    TrajectoryWriter(tmp_path / "log", identity(optimizer)).close()
    again = make()
    assert replay(again, tmp_path / "log", snapshot=save_snapshot(optimizer, tmp_path)) == 0
    assert what_is(again) == what_is(optimizer)


def test_what_is_written_meanwhile_is_not_in_it(tmp_path: Path) -> None:
    optimizer = stepped()
    expected = what_is(optimizer)
    pending = PendingSnapshot(optimizer, tmp_path)
    for _ in range(3):
        optimizer.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
    assert snapshots_in(tmp_path) == []
    again = make()
    load_snapshot(again, pending.finish())
    assert what_is(again) == expected != what_is(optimizer)


def test_training_goes_on_while_a_snapshot_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = (
        write_config(tmp_path, train={"steps": 9, "snapshot_every": 4, "eval_every": 0}),
        tmp_path / "run",
    )
    save, seen = snapshot.save_file, []

    def slowly(*args: Any) -> None:
        deadline = time.monotonic() + 60
        began = last_step(run)
        # The next snapshot waits for this one, and so does the end.
        while last_step(run) < min(began + 3, 9) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((began, last_step(run), [path.name for path in snapshots_in(run / "snapshots")]))
        save(*args)

    monkeypatch.setattr(snapshot, "save_file", slowly)
    assert main(["train", str(path)]) == 0
    # (A step may be over between the copy and the first look.)
    assert [(after, there) for _, after, there in seen] == [(7, []), (9, ["step-00000004"])]
    assert [path.name for path in snapshots_in(run / "snapshots")] == ["step-00000004", "step-00000008"]
    assert main(["check", str(run)]) == 0


def last_step(run: Path) -> int:
    return max((e["step"] for e in read_metrics(run) if e["event"] == "step"), default=0)


def save_where_rank_1_has_a_full_disk(engine: str, folder: str) -> None:
    optimizer = make(engine)
    with remembered_noise():
        save_snapshot(optimizer, folder)
        optimizer.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
    # Of fsdp2, rank 1 writes half of the weights; of copies, the first rank writes all.
    full = int(engine == "fsdp2")
    with files_no_longer_than(500) if optimizer.engine.rank == full else nullcontext():
        save_snapshot(optimizer, folder)


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_a_full_disk_on_one_rank_is_told_to_all_and_spares_what_was_there(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    for error in pool(2).errors(save_where_rank_1_has_a_full_disk, engine, str(tmp_path)):
        assert f"rank-{int(engine == 'fsdp2'):05}.safetensors cannot be written" in error
    assert [path.name for path in snapshots_in(tmp_path)] == ["step-00000000"]
    pool(2).run(load_there, engine, str(tmp_path / "step-00000000"))
    # It is in nobody's way.
    pool(2).run(save_there, engine, str(tmp_path))
    assert [path.name for path in snapshots_in(tmp_path)] == ["step-00000000", "step-00000004"]
    (tmp_path / "step-00000004" / "rank-00001.safetensors").unlink()
    for error in pool(2).errors(load_there, engine, str(tmp_path / "step-00000004")):
        assert "rank-00001.safetensors is missing; delete" in error


def test_a_run_resumes_from_its_snapshot_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path, train={"steps": 5, "snapshot_every": 2, "eval_every": 0})
    run = tmp_path / "run"
    assert main(["train", str(path)]) == 0
    assert main(["check", str(run)]) == 0
    expected = '"steps": 5, "cut_short": 0, "events": 9, "snapshots": ["step-00000002", "step-00000004"]'
    expected += ', "models": ["last"]'
    assert expected in capsys.readouterr().out
    assert main(["train", str(path), "train.steps=7"]) == 0
    assert "step-00000004" in caplog.text
    assert main(["train", str(path), "train.steps=7", f"train.output={tmp_path / 'other'}"]) == 0
    saved = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("run", "other")]
    assert saved[0] == saved[1]
    assert len([e for e in read_metrics(run) if e["event"] == "step"]) == 7
    # A snapshot that is damaged is named, and the run goes on without it once it is gone.
    file = run / "snapshots" / "step-00000006" / "rank-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for command in (["train", str(path), "train.steps=8"], ["check", str(run)]):
        assert main(command) == 2
        assert "step-00000006/rank-00000.safetensors is damaged" in capsys.readouterr().err
    shutil.rmtree(file.parent)
    assert main(["train", str(path), "train.steps=8"]) == 0
    assert len(list(TrajectoryReader(run / "trajectory.zo"))) == 8
    assert main(["check", str(tmp_path / "nothing")]) == 2


def without_room(folder: str, copies: bool) -> dict[str, Any]:
    """A snapshot by a machine with room for a copy of the weights, or without."""
    import psutil

    optimizer = stepped("fsdp2")
    nbytes = sum(span.flat.nbytes for span in optimizer.engine.spans(optimizer.params))
    with pytest.MonkeyPatch.context() as patch:
        free = 100 * nbytes * optimizer.engine.num_ranks if copies else nbytes
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
        pending = PendingSnapshot(optimizer, folder)
    assert pending.copies == copies
    # What is not copied is on the disk before the weights change again.
    written = pending.written if not copies else None
    expected = digest(whole_weights(optimizer))
    optimizer.step_batch(rows_for("sequential", 6, dtype=torch.bfloat16), loss_of)
    path = pending.finish()
    again = make("fsdp2")
    load_snapshot(again, path)
    return {"same": digest(whole_weights(again)) == expected, "written": written}


@pytest.mark.parametrize("copies", [True, False])
def test_a_snapshot_needs_no_room_for_a_copy(
    pool: Callable[[int], Pool], tmp_path: Path, copies: bool
) -> None:
    found = pool(2).run(without_room, str(tmp_path), copies)
    assert found == [{"same": True, "written": None if copies else True}] * 2
