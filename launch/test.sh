#!/usr/bin/env bash
# Every check: linter, types, the documentation, the wheel (built from the source package) installed and used
# from another folder, all tests.
#
#   bash launch/test.sh [pytest arguments ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment deepspeed,docs,test
choose_processes
export OMP_NUM_THREADS=1

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy

say "the documentation"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --quiet --strict --site-dir "$scratch/documentation"

say "the wheel, built from the source package"
"$PYTHON" -m build --outdir "$scratch" . >"$scratch/build.log" 2>&1 || { tail -n 30 "$scratch/build.log"; exit 1; }
packed=$(tar -tzf "$scratch"/*.tar.gz)
for path in LICENSE zo_dist/native.cpp tests/reference.py docs/index.md configs/quickstart.yaml launch/common.sh; do
    grep -q "/$path\$" <<<"$packed" || fail "the source package lacks $path"
done
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
