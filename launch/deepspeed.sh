#!/usr/bin/env bash
# Train under the deepspeed launcher with a DeepSpeed config as it is.
#
#   bash launch/deepspeed.sh CONFIG DS_CONFIG.json [section.key=value ...]
#
# RANKS: processes on this node (default: its GPUs, or 2). HOSTFILE: for several nodes.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash launch/deepspeed.sh CONFIG DS_CONFIG.json [section.key=value ...]" >&2; exit 2; }
config=$1 ds_config=$2
shift 2
PYTHON=${PYTHON:-python3}
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))}
where=(--num_gpus "$RANKS")
if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE")
fi
exec deepspeed "${where[@]}" --module zo_dist train "$config" --deepspeed "$ds_config" "$@"
