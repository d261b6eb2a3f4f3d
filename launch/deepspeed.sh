#!/usr/bin/env bash
# Train under the deepspeed launcher with a DeepSpeed config as it is.
#
#   bash launch/deepspeed.sh CONFIG DS_CONFIG.json [section.key=value ...]
#   HOSTFILE=hosts bash launch/deepspeed.sh CONFIG ...               # on one node; starts all by pdsh and ssh
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=node0 bash launch/deepspeed.sh CONFIG ...  # on each node; no ssh
#
# RANKS: processes on this node (default: its GPUs, or 2). HOSTFILE: lines of `name slots=N`; NODE_RANK: the
# line of this node, from 0. MASTER_PORT: free at MASTER_ADDR (29500).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "usage: bash launch/deepspeed.sh CONFIG DS_CONFIG.json [section.key=value ...]"
config=$1 ds_config=$2
shift 2
choose_processes
where=(--num_gpus "$RANKS" --master_port "${MASTER_PORT:-29500}")
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    # With --num_gpus the launcher would take the first GPUs of the machine instead.
    where=(--include "localhost:$(cut -d, -f "1-$RANKS" <<< "$CUDA_VISIBLE_DEVICES")" --master_port "${MASTER_PORT:-29500}")
fi
if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
    if [ -n "${NODE_RANK:-}" ]; then
        where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?name the first node}")
    fi
fi
exec deepspeed "${where[@]}" --module zo_dist train "$config" --deepspeed "$ds_config" "$@"
