"""Imported once by the server that rank processes are forked from (see workers.py)."""

import importlib
import importlib.util

import torch
import torch.distributed.fsdp
import transformers

torch.set_num_threads(1)
importlib.import_module("zo_dist")
# transformers imports models lazily.
for kind in (
    "LlamaForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
):
    getattr(transformers, kind)
if importlib.util.find_spec("deepspeed"):
    importlib.import_module("deepspeed.runtime.zero.partition_parameters")
