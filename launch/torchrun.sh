#!/usr/bin/env bash
# Train under torchrun in the environment that is active; on several nodes, run it on each.
#
#   bash launch/torchrun.sh CONFIG [section.key=value ...]
#
# RANKS: processes on this node (default: its GPUs, or 2). NODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT: for several nodes, as torchrun means them.
set -euo pipefail
PYTHON=${PYTHON:-python3}
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))}
if [ "${NODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${MASTER_PORT:-29500}")
else
    where=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$RANKS" "${where[@]}" -m zo_dist train "$@"
