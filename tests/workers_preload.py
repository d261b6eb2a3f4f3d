"""Imported once by the server that rank processes are forked from (see workers.py)."""

import importlib.util

import torch
import torch.distributed
import torch.distributed.fsdp
import transformers

import zo_dist

torch.set_num_threads(1)
for kind in ("Llama", "OPT", "GPT2", "Qwen3", "Mixtral"):  # transformers imports models lazily
    getattr(transformers, f"{kind}ForCausalLM")
if importlib.util.find_spec("deepspeed"):
    import deepspeed
    import deepspeed.runtime.zero.partition_parameters
assert zo_dist
