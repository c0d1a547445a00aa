#!/usr/bin/env bash
# All checks: ruff, basedpyright, pytest.
# usage: test.sh [--slow] [arguments for pytest]      --slow: also what takes minutes
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-$PWD/.venv}"
VENV="$venv" bash scripts/setup.sh dev

arguments=()
for argument in "$@"; do
    if [ "$argument" = "--slow" ]; then
        arguments+=(-m "slow or not slow")
    else
        arguments+=("$argument")
    fi
done

export HF_HUB_OFFLINE=1
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/basedpyright" --pythonpath "$venv/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two processes of one thread each suit tiny models
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile ${arguments[@]+"${arguments[@]}"}
