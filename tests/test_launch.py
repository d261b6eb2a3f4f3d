"""The launchers start what they should: torchrun, deepspeed, and the scripts around them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment, launch, result_of, write_model, write_rows

REPOSITORY = Path(__file__).parent.parent
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


@pytest.fixture
def shrunk(tmp_path: Path) -> list[str]:
    """Overrides that leave of the quickstart its keys, and take seconds: model, data and counts."""
    return [
        f"model.source={write_model(tmp_path / 'model')}",
        r"model.parameters=layers\.[12]\.",
        f"data.source={write_rows(tmp_path / 'rows.jsonl')}",
        *("data.train=32", "data.validation=8", "data.test=8"),
        *("train.steps=2", "train.eval_every=1", f"train.output={tmp_path / 'run'}"),
    ]


def _deepspeed(*args: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("deepspeed")
    command = [str(script), "--num_gpus", "2", "--master_port", "29653", "--module", "zo_dist", *args]
    # It starts `python3` of the PATH.
    path = f"{script.parent}:/usr/bin:/bin"
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment() | {"PATH": path}, check=False
    )


def test_torchrun_runs_the_quickstart_config(shrunk: list[str]) -> None:
    done = launch(["train", QUICKSTART, *shrunk])
    assert done.returncode == 0, done.stderr[-3000:]
    result = result_of(done.stdout)
    assert (result["engine"], result["ranks"], result["steps"]) == ("fsdp2", 2, 2)


@pytest.mark.slow
def test_deepspeed_runs_the_quickstart_config(shrunk: list[str]) -> None:
    ds_config = str(REPOSITORY / "configs" / "ds_zero3.json")
    done = _deepspeed("train", QUICKSTART, "--deepspeed", ds_config, *shrunk)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = result_of(done.stdout)
    assert (result["engine"], result["ranks"], result["steps"]) == ("deepspeed", 2, 2)


def test_deepspeed_names_a_mistake(tmp_path: Path) -> None:
    done = _deepspeed("train", QUICKSTART, "optimizer.eps=0")
    assert done.returncode == 2
    assert "error: optimizer.eps is 0.0" in done.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]], ids=str)
def test_help(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zo_dist", *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: zo-dist" in done.stdout


def test_importing_the_package_starts_nothing() -> None:
    code = "import sys, logging, zo_dist; assert not logging.getLogger().handlers; "
    code += "assert not {'deepspeed', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")
@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("launch/*.sh")), ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_quickstart_refuses_an_unknown_mode() -> None:
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch/quickstart.sh"), "zero2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "neither fsdp2 nor zero3" in done.stderr
