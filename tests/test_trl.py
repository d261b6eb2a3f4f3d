"""ZOSFTTrainer: TRL's SFTTrainer trains by zeroth-order steps, on the loss that is TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_run import write_model
from transformers import AutoTokenizer
from workers import Pool

import zo_dist

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[test]')")

ROWS = [
    {"prompt": f"number {i} It was", "completion": f" {'great' if i % 2 else 'dull cold'}"} for i in range(16)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("base") / "model", tied=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # SFTTrainer ends completions with it.
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


def trainer(base: Path, output: Path, zo: dict[str, Any] | None = None, **more: Any) -> Any:
    from zo_dist.integrations.trl import ZOSFTTrainer

    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    options.update(max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, max_length=32, seed=0)
    options.update(logging_steps=1, save_strategy="no", per_device_eval_batch_size=16)
    peft_config = more.pop("peft_config", None)
    return ZOSFTTrainer(
        model=str(base),
        args=trl.SFTConfig(output_dir=str(output), **{**options, **more}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        peft_config=peft_config,
        zo={"eps": 1e-2, "directions": 2, **(zo or {})},
    )


def test_the_loss_is_trls_on_the_completions_alone(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path)
    (batch,) = ours.get_eval_dataloader()
    # " dull cold" or " great", and the end.
    assert set((batch["labels"] != -100).sum(1).tolist()) == {2, 3}
    with torch.no_grad():
        sums, weights = zo_dist.causal_lm_loss(ours.model.eval(), dict(batch))
    # Both are float32 sums of some 40 losses of about 6.
    assert float(sums.sum() / weights.sum()) == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-5)


def test_logs_and_metrics_are_told_apart(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path, eval_strategy="steps", eval_steps=3)
    ours.train()
    steps = [entry for entry in ours.state.log_history if "loss" in entry]
    (evaluated,) = (entry for entry in ours.state.log_history if "eval_loss" in entry)
    assert len(steps) == 3
    assert not any(key.startswith("eval_") for entry in steps for key in entry)
    assert evaluated["eval_entropy"] > 0


def test_a_loss_by_the_fused_head_needs_shards_or_a_frozen_head(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model's head is trained"):
        trainer(base, tmp_path, loss_type="dft").train()
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for more in ({"zo": {"perturb": "shard"}}, {"peft_config": lora}):
        ours = trainer(base, tmp_path, loss_type="dft", eval_strategy="steps", eval_steps=3, **more)
        before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
        ours.train()
        moved = {name for name, p in ours.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in ours.model.named_parameters() if p.requires_grad}
        # One evaluation's batch alone, not those of probes at shifted weights.
        (entry,) = (entry for entry in ours.state.log_history if "eval_loss" in entry)
        assert entry["eval_entropy"] > 0


def train_on_ranks(base: Path, output: Path, engine: dict[str, Any]) -> tuple[str, list[float]]:
    from test_transformers import of_its_own

    with of_its_own():
        ours = trainer(base, output, save_strategy="steps", save_steps=3, **engine)
        ours.train()
        losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
        return ours.optimizer.engine.name, losses


def test_two_ranks_train_to_the_same_bits(pool: Callable[[int], Pool], base: Path, tmp_path: Path) -> None:
    saved = []
    for name, engine in (("replicated", {}), ("fsdp2", {"fsdp": True})):
        outcomes = pool(2).run(train_on_ranks, base, tmp_path / name, engine)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] == name
        saved.append((outcomes[0][1], (tmp_path / name / "checkpoint-3" / "model.safetensors").read_bytes()))
    assert saved[0] == saved[1]
