#!/usr/bin/env bash
# Train under `accelerate launch` in the environment that is active; on several nodes, run it on each.
#
#   bash launch/accelerate.sh CONFIG [section.key=value ...]
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/accelerate.sh CONFIG ...
#
# RANKS: processes on this node (default: its GPUs, or 2). NODE_RANK: of this node, from 0. MASTER_PORT: free
# at MASTER_ADDR (29500). accelerate.yaml says the rest; for a ZOTrainer script, pass it to `accelerate launch`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
choose_processes
where=(--num_processes "$((RANKS * ${NODES:-1}))" --num_machines "${NODES:-1}" --main_process_port "${MASTER_PORT:-29500}")
if [ "${NODES:-1}" -gt 1 ]; then
    where+=(--machine_rank "${NODE_RANK:?}" --main_process_ip "${MASTER_ADDR:?name the first node}")
fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    export ACCELERATE_USE_CPU=true
fi
config=$(dirname "${BASH_SOURCE[0]}")/accelerate.yaml
exec accelerate launch --config_file "$config" "${where[@]}" -m zo_dist train "$@"
