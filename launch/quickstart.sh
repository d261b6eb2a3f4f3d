#!/usr/bin/env bash
# Fine-tune a real model on real data on this machine, GPUs or not, with sharded weights.
#
#   bash launch/quickstart.sh [fsdp2|zero3] [section.key=value ...]
#
# Needs Python >= 3.11, a C++ compiler and a package index. One process per GPU, or 2 on the CPU.
# RANKS, OMP_NUM_THREADS, PYTHON in the environment are respected. The last line is `result: {...}`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

mode=fsdp2
case "${1:-}" in
fsdp2 | zero3)
    mode=$1
    shift
    ;;
"" | *.*=*) ;;
*) fail "'$1' is neither fsdp2 nor zero3 nor an override like train.steps=10" ;;
esac
settings=("train.output=runs/quickstart-$mode" train.existing=replace)
if [ "$mode" = zero3 ]; then
    settings+=(engine.kind=deepspeed engine.deepspeed=configs/ds_zero3.json)
fi

make_environment deepspeed
choose_processes
say "training on $RANKS processes of $OMP_NUM_THREADS threads ($mode)"
result=$(mktemp)
trap 'rm -f "$result"' EXIT
# The result is held back, so that it is the last line whatever the launcher says at its end.
"$PYTHON" -m torch.distributed.run --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    -m zo_dist train configs/quickstart.yaml "${settings[@]}" "$@" |
    sed -u -n -e "/^result: /w $result" -e '/^result: /!p'
"$PYTHON" - "$result" <<'PY'
import json, sys

result = json.loads(open(sys.argv[1]).read().removeprefix("result: "))
print(
    f"test accuracy {result['accuracy_before']:.1%} -> {result['accuracy_after']:.1%}, "
    f"loss {result['loss_before']:.3f} -> {result['loss_after']:.3f} "
    f"in {result['steps']} steps, {result['seconds']:.0f} s"
)
PY
cat "$result"
