"""Who holds the weights: one adapter per way of distributing a model, chosen in one place.

Nothing else in the package imports `torch.distributed`, DeepSpeed or FSDP.
"""

from __future__ import annotations

from zo_dist.engines.agreement import DesyncError
from zo_dist.engines.base import Engine
from zo_dist.engines.ds_config import DsConfig, read_ds_config
from zo_dist.engines.pipeline import pipeline
from zo_dist.engines.processes import (
    first_of_node,
    initialize_process_group,
    leave_process_group,
    on_each_node_first,
)
from zo_dist.engines.select import forwards_in_step, select

__all__ = [
    "DesyncError",
    "DsConfig",
    "Engine",
    "first_of_node",
    "forwards_in_step",
    "initialize_process_group",
    "leave_process_group",
    "on_each_node_first",
    "pipeline",
    "read_ds_config",
    "select",
]
