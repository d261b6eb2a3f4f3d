"""What `save_model` writes loads again with the same bits; sharded engines are in test_train.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from injected import files_no_longer_than
from models import build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_run import environment, launch, write_config, write_model
from torch import nn
from transformers import AutoModelForCausalLM
from workers import Pool, wrap

from zo_dist.checkpoint import check_model, save_model
from zo_dist.cli import main
from zo_dist.engines import select
from zo_dist.resume import check_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_loads_with_the_same_bits(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    source = write_model(tmp_path / "source", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, param in model.named_parameters():
        param.requires_grad_("layers.1" in name)
    save_model(select(model), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_model_replaces_a_saved_model_and_nothing_else(tmp_path: Path) -> None:
    engine = select(build("sequential"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "trajectory.zo").write_bytes(b"steps")
    (tmp_path / "file").write_text("text")
    for place in (run, tmp_path, tmp_path / "file", Path("/proc")):
        with pytest.raises(ValueError, match=r"cannot be saved as .*is replaced by a rename, and it"):
            save_model(engine, place)
    assert (run / "trajectory.zo").read_bytes() == b"steps"
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", run / "last", run / "last"):
        save_model(engine, place)
        assert check_model(place)


@pytest.mark.parametrize("args", [[], ["--deepspeed", "ds_zero3.json"]], ids=["fsdp2", "zero3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_ranks_save_untouched_weights_bit_for_bit(tmp_path: Path, tied: bool, args: list[str]) -> None:
    source = write_model(tmp_path / "model", tied=tied)
    # One layer is trained: all else must come through the gather and the file as it was.
    path = write_config(
        tmp_path,
        model={"parameters": "layers.2.", "dtype": "bfloat16"},
        train={"steps": 1, "eval_every": 0},
        optimizer={"self_check": False},
    )
    configs = Path(__file__).parent.parent / "configs"
    done = launch(["train", str(path), *(a.replace("ds_", f"{configs}/ds_") for a in args)])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").state_dict()
    assert set(saved) == set(expected)
    moved = {name for name, weight in saved.items() if not torch.equal(weight, expected[name])}
    assert moved
    assert all("layers.2." in name for name in moved)


def test_a_damaged_model_is_not_trained_further(tmp_path: Path) -> None:
    """By either rank, though one of them reads the files."""
    write_model(tmp_path / "model", tied=True)
    path = write_config(tmp_path, train={"steps": 1, "eval_every": 0})
    assert main(["train", str(path)]) == 0
    saved = tmp_path / "run" / "last"
    further = ["train", str(path), f"model.source={saved}", f"train.output={tmp_path / 'next'}"]
    done = launch(further)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "files are as saved" in done.stderr
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = launch([*further, "train.existing=replace"])
    assert done.returncode != 0
    assert "model.safetensors is damaged" in done.stderr


def test_any_byte_of_a_saved_model_that_is_changed_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, train={"steps": 2, "eval_every": 1})
    assert main(["train", str(path)]) == 0
    assert main(["check", str(tmp_path / "run")]) == 0
    assert '"models": ["best", "last"]' in capsys.readouterr().out
    last = tmp_path / "run" / "last"
    assert main(["check", str(last)]) == 0
    names, checked = sorted(file.name for file in last.iterdir()), 0
    assert {"model.safetensors", "config.json", "tokenizer.json", "checksums.json"} <= set(names)
    for name in names:
        whole = (last / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 200)):
            (last / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=f"{name} is damaged.*; delete .*: zo-dist export"):
                check_run(tmp_path / "run")
            checked += 1
        (last / name).unlink()
        with pytest.raises(ValueError, match=f"{name} (is missing|cannot be read)"):
            check_run(tmp_path / "run")
        (last / name).write_bytes(whole)
    assert checked > 800
    assert main(["check", str(tmp_path / "run")]) == 0


def test_an_old_save_is_replaced_whole(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "source"))
    save_model(select(model), tmp_path / "saved")
    (tmp_path / "saved" / "stale.txt").write_text("old")
    save_model(select(model), tmp_path / "saved")
    assert not (tmp_path / "saved" / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "source"]


def test_the_folder_worked_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    engine = select(nn.Linear(2, 2))
    for path in (".", "..", tmp_path / "work"):
        with pytest.raises(ValueError, match="this process works in it"):
            save_model(engine, path)
    assert list((tmp_path / "work" / "deep").iterdir()) == []
    save_model(engine, "inside")
    assert (tmp_path / "work" / "deep" / "inside" / "model.safetensors").is_file()


def test_peft_saves_its_adapter(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    save_model(select(model), tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 50_000
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "saved")
    expected = model.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_plain_module_is_saved_with_buffers_and_ties_once(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    net = Net()
    save_model(select(net), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = {k: v for k, v in net.state_dict().items() if k != "b.weight"}
    assert set(saved) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor)


def test_a_write_that_fails_leaves_the_old_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "source"))
    save_model(select(model), tmp_path / "saved")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_model(select(model), tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_memory_is_bounded_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    """Anonymous memory: pages that no file stands behind, which the system cannot write out."""
    script = """
import sys, threading, torch
from transformers import LlamaConfig, LlamaForCausalLM
from zo_dist import checkpoint
from zo_dist.engines import select

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

config = LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8
)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = model.to_empty(device="cpu")
for param in model.parameters():
    param.data.view(torch.int32).random_(0x3F800000)  # finite, and every page touched
checkpoint.MAX_SHARD = "20MB"
engine, path = select(model), sys.argv[1]
checkpoint.save_model(engine, path)  # what is imported and allocated once
samples, over = [], threading.Event()

def sample():
    while not over.wait(0.002):
        samples.append(anonymous())

before = anonymous()
thread = threading.Thread(target=sample)
thread.start()
checkpoint.save_model(engine, path)
over.set()
thread.join()
again = LlamaForCausalLM.from_pretrained(path).state_dict()
assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
sizes = [param.nbytes for param in model.parameters()]
print(max(samples) - before, sum(sizes), max(sizes))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "saved")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    grown, model, largest = map(int, done.stdout.split()[-3:])
    print(f"{grown / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB")
    assert model > 400e6
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 10
    # A file, a weight, and the 16 MB that are read at a time for the checksums; as much again for allocators.
    assert grown < 2 * (20e6 + largest + 16e6) < model / 2


def save_on_a_full_disk(path: Path) -> None:
    model = wrap("fsdp2", build("llama"))
    with files_no_longer_than(1000):
        save_model(select(model), path)


def test_a_full_disk_under_the_gathered_weights_is_told_to_all(
    tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    for error in pool(2).errors(save_on_a_full_disk, tmp_path / "saved"):
        assert ".saved.gathered" in error
    assert list(tmp_path.iterdir()) == []
