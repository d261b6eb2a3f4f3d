"""Imported once by the server that rank processes are forked from (see workers.py)."""

import importlib
import importlib.util

import torch
import transformers

torch.set_num_threads(1)
# What tests and runs import, of which `train` brings most of the package.
for name in (
    "workers",
    "zo_dist.cli",
    "zo_dist.train",
    "torch.distributed.fsdp",
    "accelerate",
    "datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
):
    importlib.import_module(name)
# transformers imports models lazily.
for kind in (
    "LlamaForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Trainer",
):
    getattr(transformers, kind)
if importlib.util.find_spec("deepspeed"):
    importlib.import_module("deepspeed.runtime.engine")
    # Its operator for CPU ranks: who is stopped while he compiles leaves a lock on which all others wait.
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    accelerator.create_op_builder("ShareMemCommBuilder").load()
