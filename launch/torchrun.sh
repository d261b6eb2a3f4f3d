#!/usr/bin/env bash
# Train under torchrun in the environment that is active; on several nodes, run it on each.
#
#   bash launch/torchrun.sh CONFIG [section.key=value ...]
#   NODES=2 MASTER_ADDR=node0 bash launch/torchrun.sh CONFIG ...     # on every node, in any order
#
# RANKS: processes on this node (default: its GPUs, or 2). MASTER_ADDR: one of the nodes, the same on all;
# MASTER_PORT: free there (29500). RUN_ID: tells runs apart that use one port.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
choose_processes
meet=localhost:0
if [ "${NODES:-1}" -gt 1 ]; then
    meet=${MASTER_ADDR:?for several nodes, name one of them}:${MASTER_PORT:-29500}
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d --rdzv-endpoint "$meet" --rdzv-id "${RUN_ID:-zo_dist}" -m zo_dist train "$@"
