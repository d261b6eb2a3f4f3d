"""A loop of one's own with accelerate: `accelerate launch docs/examples/accelerate_loop.py MODEL`."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo_dist

accelerator = Accelerator()
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = tokenizer([f"number {i} is {'odd' if i % 2 else 'even'}" for i in range(32)], padding=True)
data = [{key: torch.tensor(value[i]) for key, value in rows.items()} for i in range(32)]
loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
# No DDP around the model: there are no gradients to average.
model = accelerator.prepare_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), evaluation_mode=True)
optimizer = zo_dist.ZeroOrder(model, lr=1e-2, directions=4, sampler=zo_dist.AdaLeZO(ratio=0.5))
for batch in loader:
    keys = ("input_ids", "attention_mask")
    loss = optimizer.step_batch({key: batch[key] for key in keys}, zo_dist.causal_lm_loss)
    accelerator.print(f"{loss:.4f}")
accelerator.wait_for_everyone()  # a rank may not leave while another still talks to it
accelerator.end_training()
