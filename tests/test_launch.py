"""The launchers start what they should: torchrun, deepspeed, and the scripts around them."""

from __future__ import annotations

import shutil
import socket
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
    command = [*_of_launcher("torchrun"), "-m", "zo_dist", "train", QUICKSTART, *shrunk]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
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
    code += "assert not {'deepspeed', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")
@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("launch/*.s*")), ids=lambda p: p.name)
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


# The scripts for several nodes, each node being one process here


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def _script(name: str, *args: str, **settings: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    settings = {"PYTHON": sys.executable, "RANKS": "1", "MASTER_PORT": _free_port(), "PATH": path, **settings}
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / name), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | settings,
    )


def _output(*nodes: subprocess.Popen[str]) -> str:
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(out[-3000:] for out in outputs)
    return "".join(outputs)


@pytest.mark.slow
def test_slurm_starts_an_agent_on_each_node(shrunk: list[str], tmp_path: Path) -> None:
    """What sbatch would run, with a `srun` that takes this machine for both nodes."""
    commands = {"scontrol": "echo localhost; echo localhost", "srun": 'for _ in 1 2; do "$@" & done; wait'}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    slurm |= {"SLURM_SUBMIT_DIR": str(REPOSITORY)}
    result = result_of(_output(_script("slurm.sbatch", QUICKSTART, *shrunk, PATH=path, **slurm)))
    assert (result["engine"], result["ranks"], result["steps"]) == ("fsdp2", 2, 2)


@pytest.mark.slow
def test_deepspeed_starts_by_a_hostfile_without_ssh(shrunk: list[str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    args = [QUICKSTART, str(REPOSITORY / "configs" / "ds_zero3.json"), *shrunk]
    settings = {"HOSTFILE": str(hosts), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    nodes = [_script("deepspeed.sh", *args, NODE_RANK=str(rank), **settings) for rank in range(2)]
    result = result_of(_output(*nodes))
    assert (result["engine"], result["ranks"], result["steps"]) == ("deepspeed", 2, 2)


@pytest.mark.slow
def test_accelerate_starts_a_run(shrunk: list[str]) -> None:
    result = result_of(_output(_script("accelerate.sh", QUICKSTART, *shrunk, RANKS="2")))
    assert (result["engine"], result["ranks"], result["steps"]) == ("fsdp2", 2, 2)


EXAMPLES = REPOSITORY / "docs" / "examples"
# A ZeRO-3 config for AdamW, as it comes with many a script; torch's AdamW, for which nothing is compiled.
ADAMW_ZERO3 = """{
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": true}},
  "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"},
  "gradient_clipping": "auto", "gradient_accumulation_steps": "auto",
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"
}"""


def _of_launcher(name: str) -> list[str]:
    scripts = Path(sys.executable).parent
    return {
        "torchrun": [str(scripts / "torchrun"), "--nproc-per-node", "2", "--master-port", "29661"],
        "deepspeed": [str(scripts / "deepspeed"), "--num_gpus", "2", "--master_port", "29662"],
        "accelerate": [
            # Its own --cpu starts a single process.
            *(str(scripts / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "29663", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no"),
        ],
    }[name]


def _example(launcher: str, script: Path, *args: str) -> str:
    more = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    if launcher == "accelerate":
        more["ACCELERATE_USE_CPU"] = "true"
    if launcher == "forked":
        done = launch([str(script), *args])
    else:
        command = [*_of_launcher(launcher), str(script), *args]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment() | more, check=False
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [("forked", "fsdp"), ("forked", "deepspeed"), ("deepspeed", "deepspeed"), ("accelerate", "none")],
)
def test_a_script_for_the_trainer_becomes_zeroth_order(tmp_path: Path, launcher: str, engine: str) -> None:
    """With Trainer in place of ZOTrainer the example runs under AdamW; as it is, without gradients."""
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    text = (EXAMPLES / "trainer.py").read_text()
    stock = text.replace("import zo_dist\nfrom zo_dist.integrations.transformers import ZOTrainer", "")
    stock = stock.replace("    TrainingArguments,\n)", "    Trainer,\n    TrainingArguments,\n)")
    stock = "".join(line for line in stock.splitlines(True) if "zo=" not in line).replace(
        "ZOTrainer(", "Trainer("
    )
    assert "zo_dist" not in stock
    (tmp_path / "stock.py").write_text(stock)
    (tmp_path / "ds.json").write_text(ADAMW_ZERO3)
    arguments = ["--model", str(model), "--data", str(rows), "--use_cpu", "--max_steps", "2"]
    arguments += ["--per_device_train_batch_size", "4", "--report_to", "none", "--learning_rate", "1e-3"]
    arguments += {"deepspeed": ["--deepspeed", str(tmp_path / "ds.json")], "none": [], "fsdp": []}[engine]
    if (launcher, engine) == ("forked", "deepspeed"):
        _example(launcher, tmp_path / "stock.py", *arguments, "--output_dir", str(tmp_path / "stock"))
    arguments += ["--fsdp"] if engine == "fsdp" else []
    out = _example(launcher, EXAMPLES / "trainer.py", *arguments, "--output_dir", str(tmp_path / "zo"))
    assert "'eval_loss'" in out
    assert (tmp_path / "zo" / "model.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_a_loop_with_accelerate(tmp_path: Path) -> None:
    out = _example("accelerate", EXAMPLES / "accelerate_loop.py", str(write_model(tmp_path / "model")))
    losses = [float(line) for line in out.split()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


# The end of a process

# What torch keeps of a group (a DeviceMesh has it) and collectives that are still on their way at the end.
BUSY_AT_EXIT = """
import sys

import torch
import torch.distributed as dist

import zo_dist

sys.setswitchinterval(10)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
kept = dist.group.WORLD
zo_dist.ZeroOrder(torch.nn.Linear(3, 3), lr=1e-3)
for _ in range(20):
    dist.all_gather([torch.empty(1_000_000)], torch.ones(1_000_000), async_op=True)
"""


def test_a_process_ends_well_while_gloo_still_holds_tensors() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUSY_AT_EXIT],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
