"""`ZOTrainer`: transformers' Trainer with zeroth-order steps in place of backward, gradient and optimizer.

What a script does with its Trainer stays: arguments, data, collator, scheduler, callbacks, evaluation,
logging, checkpoints with rotation, resume, the best model, the hub. `ZOTrainerMixin` does the same for any
other subclass of Trainer (trl.py: TRL's SFTTrainer). Written against transformers 5.23, whose methods it
overrides.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import SCHEDULER_NAME

from zo_dist.checkpoint import gathered
from zo_dist.engines import read_ds_config
from zo_dist.engines.build import (
    cast_parameters,
    fsdp2_mesh,
    is_cpu_offload,
    shard_with_fsdp2,
    zero3_engine,
)
from zo_dist.engines.select import computes_together
from zo_dist.optimizer import ZeroOrder
from zo_dist.params import evaluating
from zo_dist.probes import Batch, RowLoss, num_rows
from zo_dist.rules import SGD
from zo_dist.settings import nearest
from zo_dist.snapshot import load_snapshot, save_snapshot, snapshots_in
from zo_dist.tasks.scoring import causal_lm_loss

# The folder, in a Trainer's checkpoint, of weights and optimizer state as zo_dist keeps them.
SNAPSHOT = "zo_dist"

# Of ZeroOrder, what the Trainer has its own word for.
_TRAINERS_OWN = {"model": "model", "lr": "args.learning_rate"}
# What `causal_lm_loss` reads; a batch with more is evaluated by the model's own forward.
_CAUSAL_LM_KEYS = {"input_ids", "attention_mask", "labels"}
# How far `causal_lm_loss` may be from the model's own loss, relatively: 16-bit products of other shapes.
_SAME_LOSS = 1e-3

log = logging.getLogger(__name__)

# A mixin's `super()` is the Trainer that it is put before, and so has what a Trainer has.
_Trainer: Any = object


class ZOTrainerMixin(_Trainer):  # type: ignore[misc]
    """Put before a subclass of Trainer: `class ZOTheirTrainer(ZOTrainerMixin, TheirTrainer)`.

    `zo`: options of `zo_dist.ZeroOrder`; `lr` is `args.learning_rate`, `seed` is `args.seed` unless given.
    `row_loss`: a function `(model, batch) -> one loss per row`, or the pair (sums, weights) per row, with
    which all probes of a step share a forward. `auto` is `zo_dist.causal_lm_loss` for a causal language
    model whose Trainer computes the usual loss from input_ids, attention_mask and labels, if that is what the
    model computes too (compared once, on two rows of 8 tokens: two short forwards), and else none. None calls
    `compute_loss` once per probe: any loss, in 2 x directions forwards of the rows.

    Micro-batches that the Trainer would accumulate gradients over are the rows of one step. Where an epoch
    ends with too few to test all directions, each of them tests several. Weights are neither upcast nor
    wrapped in DDP, whose gradient buckets nothing would use: load the model in the dtype it is to be trained
    in. `fsdp` shards with FSDP2, a DeepSpeed config at stage 3 with ZeRO-3 and without its optimizer; at
    stages 0 to 2 each rank holds the model. `optim`, `adam_*`, `max_grad_norm`, NEFTune's noise and gradient
    checkpointing mean nothing here, and the log says so where they are set.

    A checkpoint holds, besides the Trainer's files, a snapshot of the trained weights and all state, which
    a resume on any number of ranks and engine reads. The folder must be seen by every rank.

    Raises ValueError, before any weight is written, for options that are no ZeroOrder's, an optimizer that
    was passed, `torch_compile`, FSDP1, DataParallel (several GPUs in one process), and `save_only_model` with
    `load_best_model_at_end`, which reads what that leaves out.
    """

    # What a Trainer has that is set here.
    model: Any
    model_wrapped: Any
    deepspeed: Any
    optimizer: Any
    lr_scheduler: Any
    _created_lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        zo: Mapping[str, Any] | None = None,
        row_loss: RowLoss | Literal["auto"] | None = "auto",
        **kwargs: Any,
    ) -> None:
        self._zo, self._row_loss = dict(zo or {}), row_loss
        _require_options_of_zero_order(self._zo)
        self._micro_batches: list[Any] = []
        # The model as it was given, and as its engine holds it; whether `causal_lm_loss` is its loss.
        self._held: tuple[Any, Any] | None = None
        self._is_own_loss: bool | None = None
        if isinstance(model, nn.Module):
            _require_own_rows(model)
        super().__init__(model, *args, **kwargs)
        self._require_trainable()

    def create_accelerator_and_postprocess(self) -> None:
        # Before accelerate makes a plugin of it, which for FSDP1 fails on a CPU with another message.
        given = self.args.fsdp_config
        if self.args.fsdp and given:
            _require_fsdp2(int(given.get("version", 2)))
        super().create_accelerator_and_postprocess()

    def _require_trainable(self) -> None:
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is not None or given is not None:
            kind = type(self.optimizer) if given is None else given[0]
            raise ValueError(
                f"{'optimizers' if given is None else 'optimizer_cls_and_kwargs'} has a {kind.__name__}; a "
                "ZOTrainer makes its own: leave it out, and say in zo={...} what the steps are to be"
            )
        if self.args.save_only_model and self.args.load_best_model_at_end:
            raise ValueError(
                "save_only_model and load_best_model_at_end are both True, but the best model is read from "
                "the snapshot that save_only_model leaves out: set one of them to False"
            )
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile is True: a compiled forward does not see shifted weights; set it to False"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"this process sees {self.args.n_gpu} GPUs and would use DataParallel; start one process for "
                "each with torchrun, deepspeed or accelerate launch"
            )
        decay, rule = self.args.weight_decay, self._zo.get("rule")
        if decay and rule is not None and rule.weight_decay != decay:
            raise ValueError(
                f"args.weight_decay is {decay}, but that of zo['rule'] is {rule.weight_decay}: give one"
            )
        idle = _idle_arguments(self.args)
        if idle and self.args.process_index == 0:
            log.warning("of no effect in zeroth-order steps: %s", ", ".join(idle))

    # The model and the optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        model = self._sharded()
        self.create_optimizer(model)
        self.create_scheduler(num_training_steps=max_steps)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return model, train_dataloader

    def _sharded(self) -> Any:
        """The model as its engine holds it, sharded at the first call for it."""
        if self._held is None or self._held[0] is not self.model:
            model = self._wrapped()
            self._held = self.model, model
        self.model_wrapped = self._held[1]
        if self.model_wrapped not in self.accelerator._models:
            # The Trainer's evaluation looks here for whether a model was prepared; `train` empties it.
            self.accelerator._models.append(self.model_wrapped)
        return self.model_wrapped

    def _wrapped(self) -> Any:
        model = self.model
        # Of one that the Trainer made.
        _require_own_rows(model)
        if self.is_deepspeed_enabled:
            model = self.deepspeed = self._with_deepspeed(model)
        elif self.args.fsdp or self.is_fsdp_enabled:
            model = self.model = self._with_fsdp2(model)
        else:
            # Autocast and the device alone: no DDP.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return model

    def _with_deepspeed(self, model: Any) -> Any:
        config = self.args.hf_deepspeed_config.config
        ds = read_ds_config(
            config,
            hidden_size=getattr(model.config.get_text_config(), "hidden_size", None),
            micro_batch=self.args.per_device_train_batch_size,
            num_ranks=self.args.world_size,
            dtype=None if config.get("bf16") or config.get("fp16") else next(model.parameters()).dtype,
        )
        for note in ds.notes if self.args.process_index == 0 else ():
            log.info("the DeepSpeed config: %s", note)
        if ds.tensor_ranks > 1:
            raise ValueError(
                f"tensor_parallel.autotp_size is {ds.tensor_ranks}, but ranks that cut layers together take "
                "the same rows, and the Trainer gives each its own: remove it, or use zo_dist.ZeroOrder"
            )
        if ds.stage == 3:
            return zero3_engine(model, ds)
        cast_parameters(model, ds.dtype)
        return model.to(self.args.device)

    def _with_fsdp2(self, model: nn.Module) -> nn.Module:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        # As `accelerate launch` has it; `args` were looked at before.
        _require_fsdp2(plugin.fsdp_version if plugin else 2)
        given = self.args.fsdp_config or {}
        offloads = is_cpu_offload(plugin.cpu_offload) if plugin else given.get("cpu_offload", False)
        precision = plugin.mixed_precision_policy if plugin else None
        return shard_with_fsdp2(
            model,
            fsdp2_mesh(self.args.device),
            offload_to_cpu=bool(offloads),
            compute_dtype=precision.param_dtype if precision else None,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            options = {"seed": self.args.seed, **self._zo}
            if self.args.weight_decay and "rule" not in options:
                options["rule"] = SGD(self.args.weight_decay)
            model = self.model if model is None else model
            self.optimizer = _SteppedByTrainer(model, lr=self.args.learning_rate, **options)
        return self.optimizer

    # The step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; with the last of a step, the step. Returns the mean loss of all ranks, or 0."""
        # By this some subclasses tell logs of training from those of evaluation. Probes run in eval mode.
        model.train()
        self._micro_batches.append(self._prepare_inputs(inputs))
        loss = 0.0
        if self.accelerator.sync_gradients:
            batches, self._micro_batches = self._micro_batches, []
            with self.compute_loss_context_manager():
                loss = self._zo_step(batches, num_items_in_batch)
        return torch.tensor(loss, device=self.args.device)

    def _zo_step(self, batches: Sequence[Any], num_items_in_batch: Any) -> float:
        optimizer: ZeroOrder = self.optimizer
        row_loss = self._row_loss_for(batches)
        if row_loss is not None:
            return optimizer.step_batch(self._enough(batches), row_loss)

        def closure() -> Tensor:
            # Some forms of `compute_loss` take the labels out of what they are given.
            losses = [
                self.compute_loss(self.model_wrapped, dict(batch), num_items_in_batch=num_items_in_batch)
                for batch in batches
            ]
            total = torch.stack(losses).sum()
            return total if self._is_scaled(num_items_in_batch) else total / len(losses)

        return optimizer.step(closure)

    def _enough(self, batches: Sequence[Batch]) -> list[Batch]:
        """These micro-batches, so often that they test all directions, where a full step's would."""
        groups = self.optimizer.num_directions // self.optimizer.directions_per_row
        full = self.args.train_batch_size * self.args.gradient_accumulation_steps
        least = -(-groups // self.args.world_size)
        rows = sum(map(num_rows, batches))
        return list(batches) * (-(-least // rows) if 0 < rows < least <= full else 1)

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Do the losses of micro-batches add up to the mean, or are they means?"""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _row_loss_for(self, batches: Sequence[Batch]) -> RowLoss | None:
        if self._row_loss != "auto":
            return self._row_loss
        usual = self._computes_usual_loss() and self.compute_loss_func is None and self.label_smoother is None
        readable = all(set(batch) <= _CAUSAL_LM_KEYS and "labels" in batch for batch in batches)
        if not (usual and readable and _is_causal_lm(self.accelerator, self.model)):
            return None
        if self._is_own_loss is None:
            self._is_own_loss = self._compare_losses()
        return causal_lm_loss if self._is_own_loss else None

    @torch.no_grad()
    def _compare_losses(self) -> bool:
        """Is `causal_lm_loss` what the model computes, which may not shift labels, or add a router's loss?"""
        engine = self.optimizer.engine
        ids = torch.arange(8, device=self.args.device) % self.model.config.get_text_config().vocab_size
        ids = torch.stack([ids, ids.flip(0)])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with evaluating(engine.module), self.compute_loss_context_manager():
            own = float(self.model_wrapped(**batch).loss)
            engine.publish()
            sums, weights = causal_lm_loss(engine.module, batch)
        engine.publish()
        ours = float(sums.sum() / weights.sum())
        if abs(ours - own) <= _SAME_LOSS * abs(own):
            return True
        if self.args.process_index == 0:
            log.warning(
                "the model's own loss is not the mean over tokens of zo_dist.causal_lm_loss (%.4g, not %.4g, "
                "on two short rows): each probe runs by itself, %d forwards per step; give row_loss for one",
                *(own, ours, 2 * self.optimizer.directions),
            )
        return False

    def _computes_usual_loss(self) -> bool:
        """Is `compute_loss` the mean cross-entropy over the tokens that have labels?"""
        return type(self).compute_loss is Trainer.compute_loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """There is no gradient."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """There is no gradient."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sharded()
        return super().evaluation_loop(*args, **kwargs)

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.optimizer is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        engine = self.optimizer.engine
        # Inside the folder, which stays: it may be a file system of its own.
        with gathered(engine, folder / "model") as state, engine.jointly():
            self._save(str(folder), state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_snapshot(self.optimizer, Path(output_dir) / SNAPSHOT)
        with self.optimizer.engine.jointly():
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_snapshot(self.optimizer, _snapshot_of(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        # Schedulers leave the rate that is due with the optimizer, whose own is no part of a snapshot.
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights come with the state, once there is an optimizer."""
        _snapshot_of(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        log.info("loading the best model, %s", self.state.best_model_checkpoint)
        load_snapshot(self.optimizer, _snapshot_of(self.state.best_model_checkpoint))


class ZOTrainer(ZOTrainerMixin, Trainer):
    """transformers' Trainer whose steps are zeroth-order; see `ZOTrainerMixin` for `zo` and `row_loss`."""


class _SteppedByTrainer(ZeroOrder):
    """The Trainer's loop calls `step` after `training_step`, which is where the step was taken."""

    def step(self, closure: Any = None) -> float:  # type: ignore[override]
        return 0.0 if closure is None else super().step(closure)


def _require_options_of_zero_order(options: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(ZeroOrder).parameters if name not in _TRAINERS_OWN]
    for name in options:
        if name in _TRAINERS_OWN:
            raise ValueError(f"zo has {name!r}; in a Trainer that is {_TRAINERS_OWN[name]}")
        if name not in known:
            raise ValueError(
                f"zo has {name!r}, which is no option of zo_dist.ZeroOrder; {nearest(name, known)}"
            )


def _require_own_rows(model: nn.Module) -> None:
    if computes_together(model):
        raise ValueError(
            "ZOTrainer gives each rank rows of its own, but ranks compute parts of one model here "
            "(tensor parallelism, a pipeline): use step_batch"
        )


def _require_fsdp2(version: int) -> None:
    if version != 2:
        raise ValueError(
            f"fsdp_config.version is {version}: FSDP1's flattened parameters have no names of their own; set "
            "it to 2"
        )


def _idle_arguments(args: TrainingArguments) -> list[str]:
    """Arguments that were set, to other than their default, and that a step has no use for."""
    names = [name for name in vars(args) if name.startswith("adam_")]
    names += ["optim", "optim_args", "max_grad_norm", "gradient_checkpointing", "activation_checkpointing"]
    names += ["neftune_noise_alpha"]
    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    return [n for n in names if getattr(args, n, None) not in (None, False, defaults.get(n))]


def _is_causal_lm(accelerator: Any, model: Any) -> bool:
    module = accelerator.unwrap_model(model)
    if hasattr(module, "active_peft_config"):
        if module.active_peft_config.is_prompt_learning:
            # Virtual tokens come before the row's own: columns of labels and logits differ.
            return False
        module = module.get_base_model()
    return type(module).__name__.removeprefix("FSDP") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _snapshot_of(checkpoint: str) -> Path:
    found = snapshots_in(Path(checkpoint) / SNAPSHOT)
    if not found:
        raise ValueError(
            f"{checkpoint} has no {SNAPSHOT}/step-N: it was saved with save_only_model=True, or by another "
            "Trainer. Begin from it as a model instead: from_pretrained(...), without resume_from_checkpoint"
        )
    return found[-1]
