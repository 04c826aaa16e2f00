#!/usr/bin/env bash
# Run every check on the CPU: linters, types, import layers, tests.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh -m "not engine"    # arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() {
    echo
    echo "== $1"
    shift
    "$@"
}

stage "setup" bash scripts/setup.sh tests
bin=.venv/bin
stage "ruff check" $bin/ruff check .
stage "ruff format" $bin/ruff format --check .
stage "mypy" $bin/mypy
stage "import layers" $bin/lint-imports
stage "Triton kernels, interpreted" env TRITON_INTERPRET=1 $bin/python -m pytest tests/ops tests/cache/test_heap.py
stage "pytest" $bin/python -m pytest --durations=15 "$@"
echo
echo "all checks passed"
