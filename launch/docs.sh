#!/usr/bin/env bash
# Build the documentation into build/site, every link and reference checked; `serve` shows it while you write.
#
#   bash launch/docs.sh [build | serve] [mkdocs arguments ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment docs
command=${1:-build}
shift $(($# > 0))
export NO_MKDOCS_2_WARNING=1
exec "$PYTHON" -m mkdocs "$command" --strict "$@"
