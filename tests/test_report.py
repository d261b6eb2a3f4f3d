"""The report of runs: what its charts hold is what the runs' files hold, and the page works in a browser."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_config

from zo_dist.cli import main
from zo_dist.engines import initialize_process_group, leave_process_group
from zo_dist.models import load_model, load_tokenizer
from zo_dist.report import charts_of, write_report
from zo_dist.report.chart import Bars, Chart, Heat, Line
from zo_dist.report.costs import spent
from zo_dist.report.history import History
from zo_dist.report.table import faults
from zo_dist.runlog import read_metrics
from zo_dist.train import build_optimizer
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryReader, TrajectoryWriter

# Of the tiny model: its embeddings, three layers.
NUM_ARMS = 4

SAMPLERS: dict[str, dict[str, Any]] = {
    "learns": {"name": "adalezo", "ratio": 0.5},
    "fitted": {"name": "fitted_adalezo", "draws": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two short runs, of other samplers; the first was killed in the middle of a record, and went on."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, sampler in SAMPLERS.items():
        output = folder / name
        optimizer = {"sampler": sampler, "compile": False, "self_check": False}
        path = write_config(folder, optimizer=optimizer, train={"steps": 8, "output": str(output)})
        more = ["train.save_last=false", "train.save_best=false"]
        if name == "learns":
            assert main(["train", str(path), *more, "train.steps=4"]) == 0
            # As `kill -9` leaves it: no end in the metrics, and a part of a record in the log.
            log, metrics = output / "trajectory.zo", output / "metrics.jsonl"
            log.write_bytes(log.read_bytes()[:-7])
            lines = metrics.read_text().splitlines(keepends=True)
            metrics.write_text("".join(line for line in lines if json.loads(line)["event"] != "stop"))
        assert main(["train", str(path), *more]) == 0
        made[name] = output
    return made


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert main(["report", *map(str, runs.values()), "--out", str(out)]) == 0
    return out / "report.html"


def chart(charts: list[Chart], key: str) -> Chart:
    (found,) = (each for each in charts if each.key == key)
    return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_probabilities_are_those_of_the_optimizer(runs: dict[str, Path], name: str) -> None:
    """A replay with the model itself passes through the same probabilities, to the bit."""
    run = History(runs[name])
    config = run.config
    device = initialize_process_group()
    _, hf_config = load_tokenizer(config.model)
    optimizer = build_optimizer(config, load_model(config, hf_config, device, 0, 1))
    seen = []
    for record in TrajectoryReader(runs[name] / "trajectory.zo"):
        seen.append(list(optimizer.sampler.probabilities))  # type: ignore[attr-defined]
        optimizer.replay(record)
    leave_process_group()
    assert run.probabilities == seen
    assert seen[0] != seen[-1]
    (heat,) = (m for m in chart(charts_of([run]), "probabilities-1").marks if isinstance(m, Heat))
    assert [list(column) for column in zip(*heat.z, strict=True)] == seen
    assert list(heat.rows) == [arm.name for arm in optimizer.arms]


def test_a_log_of_another_sampler_is_not_explained(runs: dict[str, Path], tmp_path: Path) -> None:
    for file in ("metrics.jsonl", "trajectory.zo"):
        (tmp_path / file).write_bytes((runs["learns"] / file).read_bytes())
    reader = TrajectoryReader(tmp_path / "trajectory.zo")
    records = list(reader)
    arms = tuple(tuple(arm for arm in range(NUM_ARMS) if arm not in drawn) for drawn in records[2].arms)
    weights = tuple((1.0,) * len(drawn) for drawn in arms)
    other = dataclasses.replace(records[2], arms=arms, weights=weights)
    with TrajectoryWriter(tmp_path / "trajectory.zo", reader.header) as log:
        for record in (*records[:2], other):
            log.append(record)
    with pytest.raises(TrajectoryError, match="step 2 drew other arms"):
        charts_of([History(tmp_path)])


def test_charts_hold_what_the_files_hold(runs: dict[str, Path]) -> None:
    run = History(runs["learns"])
    charts = charts_of([run])
    records = list(TrajectoryReader(runs["learns"] / "trajectory.zo"))
    metrics = read_metrics(runs["learns"])
    lines = {m.name.split(": ")[1]: m for m in chart(charts, "loss").marks if isinstance(m, Line)}
    assert lines["steps"].x == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines["steps"].y == [sum(r.losses) / 2 for r in records]
    steps = [e for e in metrics if e["event"] == "step"]
    assert lines["steps"].y == pytest.approx([e["loss"] for e in steps], rel=1e-12)
    assert lines["steps"].seconds == [e["seconds"] for e in steps]
    for key, times in (("loss", 1.0), ("accuracy", 100.0)):
        of_key = chart(charts, "loss" if key == "loss" else "metrics")
        for split in ("validation", "test"):
            evals = [e for e in metrics if e["event"] == "eval" and e["split"] == split]
            (line,) = (m for m in of_key.marks if isinstance(m, Line) and m.name.endswith(split))
            assert (line.x, line.y) == ([e["step"] for e in evals], [times * e[key] for e in evals])
    (bars,) = (m for m in chart(charts, "draws").marks if isinstance(m, Bars))
    drawn = [sum(e["drawn"][arm] for e in steps) for arm in range(len(run.arms))]
    assert bars.values == [100 * count / (2 * len(steps)) for count in drawn]
    rates = chart(charts, "learning-rate").marks[0]
    assert isinstance(rates, Line)
    assert rates.y == [r.lr for r in records]


def test_time_and_memory_of_each_step_are_recorded(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        steps = [e for e in read_metrics(folder) if e["event"] == "step"]
        for before, event in zip([None, *steps], steps, strict=False):
            told = event["spent"]
            assert {"data", "perturb", "forward", "agree", "update"} <= set(told)
            assert min(told.values()) > 0
            # Each second is counted once.
            assert before is None or sum(told.values()) <= event["seconds"] - before["seconds"]
            (peak,) = event["host_peak"]
            assert 1e8 < peak < 1e11
            assert event["accelerator_peak"] == [None]
        run = History(folder)
        assert sum(spent(run).values()) == pytest.approx(steps[-1]["seconds"], rel=1e-6)


def test_a_kill_and_what_it_cost_are_told(runs: dict[str, Path]) -> None:
    run = History(runs["learns"])
    before, after = run.processes
    assert (before.began, before.steps, before.ended) == (0, 3, "")
    assert (after.began, after.steps, after.ended) == (3, 8, "finished")
    assert after.torn_bytes > 0
    # The metrics had the step whose record was cut short.
    assert after.lost_steps == 1
    (fault,) = faults([run, History(runs["fitted"])])
    assert (fault.run, fault.step) == (run.name, 3)
    assert "killed" in fault.what
    assert f"{after.torn_bytes} bytes" in fault.lost


def stored(folder: Path, runs: dict[str, Path], records: list[StepRecord], **settings: Any) -> History:
    """A run of these records, with the rest of `fitted`."""
    (folder / "metrics.jsonl").write_bytes((runs["fitted"] / "metrics.jsonl").read_bytes())
    header = TrajectoryReader(runs["fitted"] / "trajectory.zo").header
    header["config"]["optimizer"]["sampler"] = {"name": "dense"}
    header["config"]["optimizer"].update(settings)
    with TrajectoryWriter(folder / "trajectory.zo", header) as log:
        for record in records:
            log.append(record)
    return History(folder)


def record(step: int, slope: float, losses: tuple[float, float] = (0.7, 0.7)) -> StepRecord:
    return StepRecord(step, 1e-3, (slope,), (tuple(range(NUM_ARMS)),), (slope,), ((1.0,) * NUM_ARMS,), losses)


def test_what_is_worrying_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    # Of 300 slopes three are 30 times as large as the others: 2700 of 2997 parts of the squares.
    outliers = [record(i, 30.0 if i % 100 == 50 else (-1.0) ** i) for i in range(300)]
    skipped = [StepRecord(300, 1e-3)]
    run = stored(tmp_path, runs, outliers + skipped)
    charts = charts_of([run])
    assert "the largest 1% of the slopes carry 90%" in chart(charts, "distribution").found[0]
    assert not chart(charts, "sides").found
    (fault,) = (f for f in faults([run]) if "skipped" in f.what)
    assert fault.step == 301


def test_an_eps_too_small_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    # A slope of 1e-4 at eps 1e-3: losses of .7 that differ by 2e-7, where a float32 has steps of 6e-8.
    run = stored(tmp_path, runs, [record(i, 1e-4) for i in range(20)], eps=1e-3)
    (told,) = chart(charts_of([run]), "sides").found
    assert "rounding" in told
    run = stored(tmp_path, runs, [record(i, 0.0 if i % 4 == 0 else 1.0) for i in range(20)])
    (told,) = chart(charts_of([run]), "sides").found
    assert "25% of the directions have the same loss" in told


class Reading(HTMLParser):
    """The page's figures, as plotly reads them, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, Any]] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self._in: dict[str, str | None] = {}
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag, self._in = tag, dict(attrs)
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        if self._tag == "script" and self._in.get("type") == "application/json":
            self.figures.append(json.loads(data))
        elif self._tag in ("td", "th"):
            self.cells.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def test_the_page_needs_no_network_and_holds_the_charts(page: Path, runs: dict[str, Path]) -> None:
    text = page.read_text()
    reading = Reading()
    reading.feed(text)
    assert reading.addresses
    assert all(address.startswith("#") for address in reading.addresses)
    assert "default-src 'none'" in text
    charts = [c for c in charts_of([History(folder) for folder in runs.values()]) if c.marks]
    assert len(reading.figures) == len(charts)
    for figure, each in zip(reading.figures, charts, strict=True):
        for trace, mark in zip(figure["data"], each.marks, strict=True):
            if isinstance(mark, Heat):
                assert (trace["y"], trace["z"]) == (list(mark.rows), [list(row) for row in mark.z])
            else:
                assert trace["y"] == list(mark.values if isinstance(mark, Bars) else mark.y)
    # The settings in which they differ, and no others.
    assert "optimizer.sampler.name" in reading.cells
    assert "optimizer.lr" not in reading.cells
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    assert pictures == sorted(f"{each.key}.png" for each in charts)
    assert min(path.stat().st_size for path in page.parent.glob("*.png")) > 5000


def test_names_of_runs_are_text(runs: dict[str, Path], tmp_path: Path) -> None:
    """A folder's name is no markup, neither in the page nor in its scripts."""
    folder = tmp_path / "<img src=x>&<script>alert(1)<"
    folder.mkdir()
    for file in ("metrics.jsonl", "trajectory.zo"):
        (folder / file).write_bytes((runs["fitted"] / file).read_bytes())
    told = write_report([folder], tmp_path / "page.html")
    assert told["pictures"] == []
    reading = Reading()
    reading.feed((tmp_path / "page.html").read_text())
    assert "x" not in reading.addresses
    assert len(reading.figures) == sum(bool(c.marks) for c in charts_of([History(folder)]))


def test_mistakes_name_their_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "trajectory.zo cannot be read" in capsys.readouterr().err
    with TrajectoryWriter(tmp_path / "trajectory.zo", {"arms": ["all"]}):
        pass
    assert main(["report", str(tmp_path)]) == 2
    assert "not written by zo-dist train" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("PyQt6") is None or importlib.util.find_spec("PyQt6.QtWebEngineWidgets") is None,
    reason="no browser here: docs/report.md says how to install Qt's (212 MB)",
)
def test_the_page_is_clicked_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Chromium (Qt's) opens the page; the axis, a legend and the theme are clicked with the mouse."""
    command = [sys.executable, str(Path(__file__).parent / "browser.py"), str(page), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["console"] == []
    assert seen["requests"] == [page.as_uri()]
    assert seen["drawn"] == seen["plots"] >= 11
    steps, seconds = seen["steps"], seen["seconds"]
    assert steps["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (steps["title"], seconds["title"]) == ("step", "training seconds")
    assert seconds["x"] == seconds["meta"]
    assert seen["hidden"] == ["legendonly"]
    assert seen["light"] != seen["dark"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in ("light", "dark"))
