#!/usr/bin/env bash
# One command from a fresh clone: installs, then prunes and repairs the embedded model, offline.
# Arguments go to `lit-prune fit`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-$PWD/.venv}"
VENV="$venv" bash scripts/setup.sh demo
export HF_HUB_OFFLINE=1
exec "$venv/bin/lit-prune" fit --config configs/quickstart.yaml --overwrite \
    --trainer.default_root_dir runs/quickstart "$@"
