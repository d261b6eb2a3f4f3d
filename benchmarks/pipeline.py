"""How long the ranks of a pipeline wait, against (S - 1) / (2 M + S - 1).

    python -m benchmarks.pipeline [--stages 2 4] [--micro-batches 2 4 8] [--delay 0.05] [--steps 5]

S stages are processes here, and each sign of a step flows as M micro-batches. `--delay`: seconds that every
stage sleeps in each micro-batch, so that stages take equally long also where they are more than the cores,
and a step's waiting is that of the schedule; 0 measures the model's own work, which wants a core for each
stage. Waiting is what of (stages x wall clock) no stage spent in a micro-batch, from the first one's start to
the last one's end: it has the sends in it, and whatever else runs on the machine. The median of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import torchrun
from zo_dist import ZeroOrder, causal_lm_loss, pipeline
from zo_dist.engines import initialize_process_group, leave_process_group

LAYERS, WIDTH, LENGTH, ROWS = 8, 256, 32, 16


class Timed:
    """The loss, and when each of its calls in a step began and ended on this rank."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.spent: list[tuple[float, float]] = []

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        start = time.monotonic()
        try:
            return causal_lm_loss(model, batch)
        finally:
            # The first call of a step asks for shapes alone. A stage leaves its forward by an exception.
            if self.spent:
                time.sleep(self.delay)
            self.spent.append((start, time.monotonic()))


def on_rank(parts: int, delay: float, steps: int) -> None:
    """Print the share of each step that the ranks wait."""
    from transformers import LlamaConfig, LlamaForCausalLM

    initialize_process_group()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = pipeline(LlamaForCausalLM(config).eval(), parts)
    optimizer = ZeroOrder(model, lr=1e-6, self_check=False, compile=False)
    batch = {"input_ids": torch.randint(1000, (ROWS, LENGTH))}
    loss, waiting = Timed(delay), []
    for step in range(steps + 1):
        loss.spent = []
        optimizer.step_batch(batch, loss)
        ((_, ready), *spent) = loss.spent
        busy = sum(end - start for start, end in spent)
        # CLOCK_MONOTONIC is one clock for all processes of a machine.
        everyone = optimizer.engine.exchange([ready, spent[-1][1], busy])
        wall = float(everyone[:, 1].max() - everyone[:, 0].max())
        if step:  # The first one makes the connections.
            waiting.append(1 - float(everyone[:, 2].sum()) / (len(everyone) * wall))
    if optimizer.engine.rank == 0:
        print(f"waiting: {json.dumps(waiting)}")
    leave_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[2, 4, 8], help="M, of each sign")
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print("| S | M | (S-1)/(2M+S-1) | waiting |\n|---|---|---|---|")
    for stages in arguments.stages:
        for count in arguments.micro_batches:
            command, environment = torchrun(stages, "benchmarks.pipeline")
            setting = json.dumps([2 * count, arguments.delay, arguments.steps])
            said = subprocess.check_output([*command, setting], env=environment, text=True)
            (line,) = (line for line in said.splitlines() if line.startswith("waiting: "))
            measured = statistics.median(json.loads(line.removeprefix("waiting: ")))
            expected = (stages - 1) / (2 * count + stages - 1)
            print(f"| {stages} | {count} | {expected:.1%} | {measured:.1%} |", flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        on_rank(*json.loads(sys.argv[1]))
    else:
        main()
