"""ZOTrainer: a Trainer script with its class changed; the rest of the Trainer works as before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import AutoPeftModelForCausalLM, LoraConfig, PrefixTuningConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import write_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from workers import Pool, needs_deepspeed

import zo_dist
from zo_dist.integrations.transformers import SNAPSHOT, ZOTrainer, ZOTrainerMixin

ROWS = [
    {"input_ids": (ids := [3 + (i * k) % 250 for k in range(1, 6 + i % 4)]), "labels": ids} for i in range(40)
]
ZO = {"directions": 2, "eps": 1e-2}
ENGINES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "fsdp2": {"fsdp": True},
    # As users have them for AdamW.
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
}
for section in ("zero3", "zero1"):
    config = ENGINES[section]["deepspeed"]
    config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    config["zero_optimization"]["reduce_bucket_size"] = "auto"
    config["gradient_clipping"] = config["gradient_accumulation_steps"] = "auto"
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] = "auto"


class InOrder:
    """Rows in their order, padded to one length with label -100."""

    train_dataset: Any

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrderZOTrainer(InOrder, ZOTrainer):  # type: ignore[misc]
    pass


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pads = [longest - len(row["input_ids"]) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * pad for row, pad in pairs]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * pad for row, pad in pairs]),
        "labels": torch.tensor([row["labels"] + [-100] * pad for row, pad in pairs]),
    }


@contextmanager
def of_its_own() -> Iterator[None]:
    """What accelerate keeps for a whole process is as before afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)
        # transformers goes by whether a DeepSpeed config is still alive.
        gc.collect()


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    with of_its_own():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


def arguments(output: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options.update(max_steps=6, learning_rate=1e-2, lr_scheduler_type="linear", save_strategy="no")
    options.update(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1)
    return TrainingArguments(output_dir=str(output), **{**options, **more})


def trainer(
    base: Path | nn.Module,
    output: Path,
    kind: Any = ZOTrainer,
    zo: Any = ZO,
    collate: Any = padded,
    **more: Any,
) -> Any:
    own = ("row_loss", "compute_loss_func", "callbacks", "compute_metrics", "optimizers", "train_dataset")
    own += ("optimizer_cls_and_kwargs",)
    options = {key: more.pop(key) for key in own if key in more}
    args = arguments(output, **more)
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    options = {"train_dataset": ROWS, "eval_dataset": ROWS[:8], "data_collator": collate, **options}
    return kind(model=model, args=args, zo=zo, **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The step


def test_its_steps_are_those_of_the_optimizer(base: Path, tmp_path: Path) -> None:
    """The micro-batches that gradients would be accumulated over are the rows of a step."""
    ours = trainer(base, tmp_path, InOrderZOTrainer, max_steps=5, seed=7)
    ours.train()
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = zo_dist.ZeroOrder(model, lr=1e-2, seed=7, **ZO)
    losses = []
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        batches = [padded(ROWS[8 * step + i : 8 * step + i + 4]) for i in (0, 4)]
        losses.append(optimizer.step_batch(batches, zo_dist.causal_lm_loss))
    assert same(weights(ours.model), weights(model))
    # The log rounds a float32.
    assert losses_of(ours) == pytest.approx(losses, rel=1e-6)


def tokens_squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of one's own: a sum over tokens, over their number in the whole step."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kept = targets != -100
    return (1 - logits[kept].softmax(-1).gather(1, targets[kept, None])).square().sum() / num_items_in_batch


class MeanOfMicroBatches(InOrderZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        del inputs["attention_mask"]
        loss: torch.Tensor = model(**inputs).loss
        return loss


@pytest.mark.parametrize(
    ("kind", "more", "tolerance"),
    [
        # Both are the mean over the tokens of the step. Its losses, about 6, are off by some 2**-20 of that
        # in float32, slopes by that over eps, weights by lr times that a step, which four steps add up.
        (InOrderZOTrainer, {"row_loss": None}, 6 * 2**-20 / 1e-2 * 1e-2 * 4),
        (InOrderZOTrainer, {"label_smoothing_factor": 0.0}, 0.0),
    ],
    ids=["by closure", "again"],
)
def test_a_loss_by_rows_is_that_of_the_model(
    base: Path, tmp_path: Path, kind: Any, more: dict[str, Any], tolerance: float
) -> None:
    # With one direction both ways test it on all rows.
    options: dict[str, Any] = {"zo": {"eps": 1e-2}, "max_steps": 4}
    by_rows = trainer(base, tmp_path / "1", InOrderZOTrainer, **options)
    other = trainer(base, tmp_path / "2", kind, **options, **more)
    for one in (by_rows, other):
        one.train()
    assert losses_of(other) == pytest.approx(losses_of(by_rows), rel=1e-5)
    theirs = weights(other.model)
    for name, weight in weights(by_rows.model).items():
        assert (weight - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (InOrderZOTrainer, {"compute_loss_func": tokens_squared}),
        (InOrderZOTrainer, {"label_smoothing_factor": 0.1}),
        (MeanOfMicroBatches, {}),
    ],
    ids=["a function", "label smoothing", "a method"],
)
def test_the_loss_is_the_trainers_own(base: Path, tmp_path: Path, kind: Any, more: dict[str, Any]) -> None:
    ours = trainer(base, tmp_path, kind, zo={"eps": 1e-2}, max_steps=2, **more)
    ours.train()
    # What the Trainer itself, without any step, makes of the first step's rows.
    stock = type("Stock", (InOrder, Trainer), {"compute_loss": kind.compute_loss})
    options = {key: more[key] for key in ("compute_loss_func",) if key in more}
    args = arguments(tmp_path / "stock", max_steps=1, learning_rate=0.0, optim="sgd", weight_decay=0.0)
    args.label_smoothing_factor = more.get("label_smoothing_factor", 0.0)
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = stock(model=model, args=args, train_dataset=ROWS, data_collator=padded, **options)
    theirs.train()
    # The mean of both sides is the middle one, but for the curvature: eps**2 / 2 of it, some 1e-4 each.
    assert losses_of(ours)[0] == pytest.approx(losses_of(theirs)[0], rel=1e-2)


def test_other_models_and_batches_go_by_their_own_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=2, pad_token_id=0,
    )  # fmt: skip
    rows = [{"input_ids": row["input_ids"][:6], "label": i % 2} for i, row in enumerate(ROWS)]

    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([(row["input_ids"] + [0] * 6)[:6] for row in some])
        return {"input_ids": ids, "labels": torch.tensor([row["label"] for row in some])}

    ours = trainer(
        LlamaForSequenceClassification(config), tmp_path, collate=collate, train_dataset=rows, max_steps=12,
        zo={"eps": 1e-2}, learning_rate=3e-2,
    )  # fmt: skip
    before = weights(ours.model)
    ours.train()
    assert not same(before, weights(ours.model))
    assert all(abs(loss) < 10 for loss in losses_of(ours))


def small_mixtral(router: bool) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, output_router_logits=router, router_aux_loss_coef=1.0,
            pad_token_id=0,
        )
    )  # fmt: skip


def small_bart() -> BartForCausalLM:
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    model = BartForCausalLM(BartConfig(vocab_size=256, max_position_embeddings=32, **sizes))
    for name, param in model.named_parameters():
        # Of the encoder that this form does not have.
        param.requires_grad_("encoder_attn" not in name)
    return model


@pytest.mark.parametrize(
    ("model", "own"),
    [(lambda: small_mixtral(False), False), (lambda: small_mixtral(True), True), (small_bart, True)],
    ids=["plain", "router", "unshifted"],
)
def test_a_causal_model_with_a_loss_of_its_own_is_found_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: Any, own: bool
) -> None:
    """`auto` is what the Trainer's own evaluation of the same rows is, but for the loss's curvature."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"zo": {"eps": 1e-3}, "max_steps": 1, "learning_rate": 1e-9}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    it = trainer(model(), tmp_path, InOrderZOTrainer, **options)
    with torch.no_grad():
        expected = float(it.model.eval()(**padded(ROWS[:8])).loss)
    it.train()
    # Of the curvature, eps**2 / 2 is seen.
    assert losses_of(it)[0] == pytest.approx(expected, rel=1e-3)
    assert ("the model's own loss is not" in caplog.text) == own


def test_an_epoch_may_end_with_fewer_rows_than_directions(base: Path, tmp_path: Path) -> None:
    zo = {"directions": 4, "eps": 1e-2}
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 2}
    it = trainer(base, tmp_path, InOrderZOTrainer, zo=zo, train_dataset=ROWS[:9], **options)
    it.train()
    assert it.optimizer.step_count == 6
    # The last step's one row has tested each of the four.
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = zo_dist.ZeroOrder(model, lr=1e-2, seed=it.args.seed, **zo)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
        rows = ROWS[:9][4 * (step % 3) : 4 * (step % 3) + 4]
        optimizer.step_batch([padded(rows)] * (4 if len(rows) == 1 else 1), zo_dist.causal_lm_loss)
    assert same(weights(it.model), weights(model))


def test_a_short_last_batch_tests_all_directions_of_an_anchor_step(base: Path, tmp_path: Path) -> None:
    zo = {"anchor": zo_dist.Anchor(every=2, directions=4), "eps": 1e-2}
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 1}
    # Batches of 4, 4 and 1 rows; the third is of an anchor step.
    it = trainer(base, tmp_path, InOrderZOTrainer, zo=zo, train_dataset=ROWS[:9], **options)
    it.train()
    assert it.optimizer.step_count == 3
    assert it.optimizer.skipped == 0


def test_batches_that_never_test_all_directions_are_refused(base: Path, tmp_path: Path) -> None:
    it = trainer(base, tmp_path, zo={"directions": 9})
    with pytest.raises(ValueError, match="9 directions need at least 9 rows per step"):
        it.train()


# What a Trainer has


def test_a_resume_ends_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    zo = {**ZO, "sampler": zo_dist.AdaLeZO(0.6), "rule": zo_dist.Momentum()}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = trainer(base, tmp_path / "whole", zo=zo, **options)
    whole.train()
    kept = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    zo = {**ZO, "sampler": zo_dist.AdaLeZO(0.6), "rule": zo_dist.Momentum()}
    resumed = trainer(base, tmp_path / "resumed", zo=zo, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(whole.model))
    assert losses_of(resumed)[4:] == losses_of(whole)[4:]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert same(weights(saved), weights(whole.model))


def test_evaluation_best_model_and_early_stopping(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    # So large a step that the loss rises, and the first evaluation is the best.
    ours = trainer(
        base, tmp_path, **options, learning_rate=3.0, max_steps=20, load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    ours.train()
    evaluated = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    best = evaluated.index(min(evaluated))
    assert len(evaluated) == best + 3 < 10
    assert ours.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * best + 2}")
    assert ours.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


def test_the_curves_reach_a_tracker(base: Path, tmp_path: Path) -> None:
    more = {"report_to": ["tensorboard"], "eval_strategy": "steps", "eval_steps": 3}
    it = trainer(base, tmp_path, **more)
    it.train()
    (folder,) = (tmp_path / "runs").iterdir()
    board = EventAccumulator(str(folder))
    board.Reload()
    for key, tag in (
        ("loss", "train/loss"),
        ("learning_rate", "train/learning_rate"),
        ("eval_loss", "eval/loss"),
    ):
        told = [(entry["step"], entry[key]) for entry in it.state.log_history if key in entry]
        seen = [(event.step, event.value) for event in board.Scalars(tag)]
        assert len(told) == (2 if key == "eval_loss" else 6)
        # TensorBoard keeps a float32.
        assert [step for step, _ in seen] == [step for step, _ in told]
        assert [v for _, v in seen] == pytest.approx([v for _, v in told], rel=1e-6)


def test_an_adapter_is_trained_and_saved_as_peft_does(base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    before = weights(model)
    ours = trainer(model, tmp_path, max_steps=4)
    ours.train()
    ours.save_model()
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) != ("lora_" in name) for name in before)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    batch = padded(ROWS[:4])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_virtual_tokens_go_by_the_models_own_loss(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    )
    before = weights(model)
    trainer(model, tmp_path, max_steps=2, zo={"eps": 1e-1}).train()
    assert not same(before, weights(model))


def test_a_mixin_makes_any_trainer_zeroth_order(base: Path, tmp_path: Path) -> None:
    class Theirs(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "theirs": 1.0}, *args, **kwargs)

    class Ours(ZOTrainerMixin, Theirs):
        pass

    mixed, plain = (trainer(base, tmp_path / kind.__name__, kind) for kind in (Ours, ZOTrainer))
    for one in (mixed, plain):
        one.train()
    assert same(weights(mixed.model), weights(plain.model))
    assert mixed.state.log_history[0]["theirs"] == 1.0


def test_what_means_nothing_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(base, tmp_path)
    assert "of no effect" not in caplog.text
    trainer(base, tmp_path, optim="adafactor", max_grad_norm=0.3, adam_beta2=0.95, neftune_noise_alpha=5.0)
    idle = "adam_beta2, optim, max_grad_norm, neftune_noise_alpha"
    assert f"of no effect in zeroth-order steps: {idle}" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"zo": {"epsilon": 1e-3}},
            "zo has 'epsilon', which is no option of zo_dist.ZeroOrder; did you mean eps",
        ),
        ({"zo": {"lr": 1e-3}}, "in a Trainer that is args.learning_rate"),
        ({"torch_compile": True}, "torch_compile is True"),
        ({"weight_decay": 0.1, "zo": {"rule": zo_dist.SGD(0.2)}}, "args.weight_decay is 0.1, but that of zo"),
        ({"optimizers": (torch.optim.SGD([nn.Parameter(torch.ones(1))]), None)}, "optimizers has a SGD"),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 123.0})},
            "optimizer_cls_and_kwargs has a SGD",
        ),
        (
            {
                **{"save_only_model": True, "load_best_model_at_end": True},
                **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2},
            },
            "save_only_model and load_best_model_at_end are both True",
        ),
    ],
    ids=["unknown", "lr", "compile", "decay", "optimizer", "class of an optimizer", "best of no state"],
)
def test_mistakes_are_refused_at_the_start(
    base: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(base, tmp_path, **more)


def test_weight_decay_is_the_trainers(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path, weight_decay=0.25, max_steps=1)
    ours.train()
    assert ours.optimizer.rule.weight_decay == 0.25


def test_a_checkpoint_without_state_is_refused(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(base, tmp_path, **options, save_only_model=True).train()
    with pytest.raises(ValueError, match="saved with save_only_model=True"):
        trainer(base, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# On several ranks


def train_on_ranks(base: Path, output: Path, engine: str, resume: str | None = None) -> dict[str, Any]:
    """What a rank ends with: the class of its engine, its losses, and what evaluation says."""
    with of_its_own():
        options = {**ENGINES[engine], "save_strategy": "steps", "save_steps": 3}
        if engine == "zero3":
            import deepspeed

            # On CPU ranks from_pretrained else partitions for a single one.
            deepspeed.init_distributed()
        args = arguments(output, **options)
        model = AutoModelForCausalLM.from_pretrained(base)
        ours = ZOTrainer(
            model=model, args=args, zo=ZO, train_dataset=ROWS, eval_dataset=ROWS[:8], data_collator=padded
        )
        ours.train(resume_from_checkpoint=resume)
        result = {"engine": ours.optimizer.engine.name, "losses": losses_of(ours)}
        result["eval"] = ours.evaluate()["eval_loss"]
        del ours, args, model
        return result


@pytest.fixture(scope="module")
def replicated(
    pool: Callable[[int], Pool], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("replicated")
    return output, pool(2).run(train_on_ranks, base, output, "replicated")


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(engine, marks=needs_deepspeed) for engine in ("zero3", "zero1"))]
)
def test_every_engine_trains_to_the_same_bits(
    pool: Callable[[int], Pool],
    base: Path,
    tmp_path: Path,
    replicated: tuple[Path, list[dict[str, Any]]],
    engine: str,
) -> None:
    folder, expected = replicated
    ranks = pool(2).run(train_on_ranks, base, tmp_path / "out", engine)
    name = {"fsdp2": "fsdp2", "zero3": "deepspeed", "zero1": "replicated"}[engine]
    assert [rank["engine"] for rank in ranks] == [name, name]
    assert [rank["losses"] for rank in ranks] == [rank["losses"] for rank in expected]
    assert ranks[0]["eval"] == pytest.approx(expected[0]["eval"], rel=1e-6)
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        saved = (tmp_path / "out" / checkpoint / "model.safetensors").read_bytes()
        assert saved == (folder / checkpoint / "model.safetensors").read_bytes()
    # And goes on from where another engine was.
    resumed = pool(2).run(train_on_ranks, base, tmp_path / "resumed", engine, str(folder / "checkpoint-3"))
    assert resumed[0]["losses"] == expected[0]["losses"]
    last = (tmp_path / "resumed" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert last == (folder / "checkpoint-6" / "model.safetensors").read_bytes()


def evaluate_between(base: Path, output: Path, engine: str) -> dict[str, Any]:
    """Trained twice, with evaluations before, between and after."""
    with of_its_own():
        if engine == "zero3":
            import deepspeed

            deepspeed.init_distributed()
        args = arguments(output, max_steps=2, **ENGINES[engine])
        model = AutoModelForCausalLM.from_pretrained(base)
        it = ZOTrainer(
            model=model, args=args, zo=ZO, train_dataset=ROWS, eval_dataset=ROWS[:8], data_collator=padded
        )
        evals = [it.evaluate()["eval_loss"]]
        held = it.model_wrapped
        for _ in range(2):
            it.train()
            evals.append(it.evaluate()["eval_loss"])
        result = {"evals": evals, "steps": it.optimizer.step_count, "one": it.model_wrapped is held}
        del it, args, model, held
        return result


@pytest.mark.parametrize("engine", ["replicated", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_evaluations_come_before_between_and_after(
    pool: Callable[[int], Pool], base: Path, tmp_path: Path, engine: str
) -> None:
    ranks = pool(2).run(evaluate_between, base, tmp_path, engine)
    for rank in ranks:
        assert (rank["steps"], rank["one"]) == (4, True)
        assert rank["evals"] == ranks[0]["evals"]
    assert len(set(ranks[0]["evals"])) == 3


def test_a_checkpoint_of_two_ranks_is_taken_up_by_one(
    base: Path, tmp_path: Path, replicated: tuple[Path, list[dict[str, Any]]]
) -> None:
    checkpoint = replicated[0] / "checkpoint-6"
    ours = trainer(base, tmp_path)
    ours.train(resume_from_checkpoint=str(checkpoint))
    # One rank has more steps in an epoch, so the Trainer takes one more, at the schedule's last rate of 0.
    assert (ours.optimizer.step_count, ours.optimizer.param_groups[0]["lr"]) == (7, 0.0)
    assert same(weights(ours.model), weights(AutoModelForCausalLM.from_pretrained(checkpoint)))
    assert (checkpoint / SNAPSHOT).is_dir()


def together(base: Path, output: Path, how: str) -> None:
    with of_its_own():
        model = AutoModelForCausalLM.from_pretrained(base)
        if how == "pipeline":
            model = zo_dist.pipeline(model, num_micro_batches=2)
        else:
            mesh = init_device_mesh("cpu", (2,))
            parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
        trainer(model, output)


@pytest.mark.parametrize("how", ["pipeline", "tensor parallelism"])
def test_ranks_that_compute_one_model_are_refused(
    pool: Callable[[int], Pool], base: Path, tmp_path: Path, how: str
) -> None:
    for error in pool(2).errors(together, base, tmp_path, how):
        assert error.startswith("ValueError")
        assert "ranks compute parts of one model here" in error


def test_fsdp1_is_refused(pool: Callable[[int], Pool], base: Path, tmp_path: Path) -> None:
    for error in pool(2).errors(train_with_fsdp1, base, tmp_path):
        assert "fsdp_config.version is 1" in error


def train_with_fsdp1(base: Path, output: Path) -> None:
    with of_its_own():
        trainer(base, output, fsdp=True, fsdp_config={"version": 1}).train()
