"""The memory that ZOTrainer needs to train, against that of evaluating the same rows with it.

    python -m benchmarks.trainer_memory [--rows 16] [--length 48] [--directions 1 4] [--steps 3] [--model ...]

Peaks are what the process (or the GPU's allocator) needed at most, without what it needed before it loaded
the model. A step runs each row at both sides of its direction, so that twice the rows go through the
model: evaluations of the rows and of twice as many are both measured, each before any training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from typing import Any

import torch
from transformers import TrainingArguments

from benchmarks import memory, subjects
from zo_dist import AdaLeZO, ZeroOrder, causal_lm_loss
from zo_dist.integrations.transformers import ZOTrainer


def main() -> None:
    options = parse()
    device = torch.device("cpu") if not torch.accelerator.is_available() else torch.device("cuda", 0)
    compile_kernels(device)
    memory.settled()
    before = memory.resident_bytes() if device.type == "cpu" else 0
    model = subjects.build(options.model, torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = texts(2 * options.rows, options.length, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:

        def trainer(count: int, directions: int = 1, micro_batches: int = 1) -> Any:
            args = TrainingArguments(
                output_dir=folder,
                use_cpu=device.type == "cpu",
                max_steps=options.steps,
                per_device_train_batch_size=count // micro_batches,
                gradient_accumulation_steps=micro_batches,
                per_device_eval_batch_size=count,
                learning_rate=1e-6,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                prediction_loss_only=True,
            )
            zo = {"directions": directions, "sampler": AdaLeZO(ratio=0.2), "self_check": False}
            return ZOTrainer(model, args, train_dataset=rows, eval_dataset=rows[:count], zo=zo)

        peaks = {}
        for count in (options.rows, 2 * options.rows):
            peaks[f"evaluation of {count} rows"] = memory.peak_bytes(trainer(count).evaluate, device) - before
        for directions, micro_batches in itertools.product(options.directions, (1, 2)):
            work = trainer(options.rows, directions, micro_batches).train
            name = f"ZOTrainer, {options.rows} rows in {micro_batches} micro-batches, {directions} directions"
            peaks[name] = memory.peak_bytes(work, device) - before
    first, second, *_ = peaks.values()
    for name, peak in peaks.items():
        line = {"what": name, "peak_bytes": peak, "of_evaluation": round(peak / first, 3)}
        print(
            json.dumps(line | {"of_evaluation_of_twice": round(peak / second, 3), "weights_bytes": weights})
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help=f"one of {', '.join(subjects.MODELS)}, or WIDTHxLAYERS"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens of a row")
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


def texts(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, each its own labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def compile_kernels(device: torch.device) -> None:
    """Compilers are loaded, and kernels made, before the model: they do not count as its memory."""
    model = subjects.build("64x1", torch.bfloat16).to(device)
    batch = {"input_ids": torch.ones(4, 4, dtype=torch.int64, device=device)}
    ZeroOrder(model, directions=4, self_check=False).step_batch(batch, causal_lm_loss)


if __name__ == "__main__":
    main()
