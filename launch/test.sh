#!/usr/bin/env bash
# Every check: linter, types, the wheel installed and used from another folder, all tests.
#
#   bash launch/test.sh [pytest arguments ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment deepspeed,test
choose_processes
export OMP_NUM_THREADS=1

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy

say "the wheel"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$scratch" .
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/site" "$scratch"/*.whl
(
    cd "$scratch"
    export PYTHONPATH=$scratch/site
    python -c "
import zo_dist, pathlib, sys
found = pathlib.Path(zo_dist.__file__).resolve()
assert found.is_relative_to(pathlib.Path('$scratch').resolve()), found
assert found.with_name('py.typed').is_file()
print('wheel:', zo_dist.__version__)
"
    python -m zo_dist --help >/dev/null
    site/bin/zo-dist train --help >/dev/null
)

say "pytest"
# Two files at a time: ranks wait for each other in much of a test of several processes. The order of the
# files is that of tests/conftest.py.
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
