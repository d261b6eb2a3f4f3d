# Sourced by the scripts beside it: the repository's environment, and how many processes to start.
# Where packages come from is pip's own setting (PIP_INDEX_URL, pip.conf).

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python3.12 bash launch/..."
}

# make_environment EXTRAS: enters the repository; .venv with this package installed, again only when its
# needs have changed.
make_environment() {
    local extras=$1 base stamp
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    base=$(find_python)
    if [ ! -x .venv/bin/python ]; then
        say "making .venv"
        "$base" -m venv .venv || fail "'$base -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
    fi
    PYTHON=$PWD/.venv/bin/python
    # The launchers and the compiler driver ninja are looked up by name.
    export PATH=$PWD/.venv/bin:$PATH
    stamp=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat ".venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        say "installing (once; PyTorch is large)"
        # DeepSpeed's set-up looks for the torch that it will run with.
        "$PYTHON" -m pip install --disable-pip-version-check --quiet torch==2.13.0
        "$PYTHON" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[$extras]"
        echo "$stamp" >".venv/installed-$extras"
    fi
    # DeepSpeed compiles a helper there, and a stale lock in a shared folder would make it wait.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}
}

# choose_processes: RANKS is one per GPU, or 2 without a GPU; their threads share the cores.
choose_processes() {
    local gpus cores
    PYTHON=${PYTHON:-python3}
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
    if [ "$gpus" -eq 0 ]; then
        export DS_ACCELERATOR=cpu
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
}
