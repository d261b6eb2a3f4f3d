"""How the learning rate moves over a run."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from zo_dist.config import TrainConfig


def lr_share(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (from 0), as a share of `lr`.

    It rises linearly over `warmup_steps`, then falls so that a step after the last would have
    `final_fraction`: no step is spent at a rate of 0.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    done = min(done, 1.0)
    if config.schedule == "linear":
        left = 1.0 - done
    elif config.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0
    return config.final_fraction + (1.0 - config.final_fraction) * left


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, done: int = 0) -> LambdaLR:
    """The torch scheduler that does so, for a run that has taken `done` steps; call it after each step."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: lr_share(step, config), last_epoch=done - 1)
