#!/usr/bin/env bash
# Creates .venv from requirements/cpu.lock. Repeated runs do nothing if .venv matches the lock, and start over if an earlier
# run was interrupted. PYTHON selects the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."

lock=requirements/cpu.lock
stamp=.venv/.fits
wanted="$(cat "$lock" pyproject.toml "$0" | sha256sum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c 'import sys' 2>/dev/null; then
    exit 0
fi

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
python="${PYTHON:-}"
for candidate in python3.12 python3.11 python3; do
    if [ -z "$python" ] && suitable "$candidate"; then python="$candidate"; fi
done
if [ -z "$python" ] || ! suitable "$python"; then
    echo "no Python 3.11 or 3.12 found${PYTHON:+ (PYTHON=$PYTHON is another version)}: install one, or set PYTHON, for example: PYTHON=/path/to/python3.11 make test" >&2
    exit 1
fi

# The interpreter behind a virtual environment: an active .venv cannot recreate itself.
python="$("$python" -c 'import sys; print(sys._base_executable)')"

if [ -f "$stamp" ] && suitable .venv/bin/python; then
    say "the lock has changed: bringing .venv up to date"
    rm -f "$stamp"
else
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi
python=.venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check "uv==$(sed -n 's/^uv==//p' "$lock")"

# The CPU build of torch is not on every index. Try pip's configured indexes first, then PyTorch's own index, which uv
# knows by name.
torch="$(grep '^torch==' "$lock" | cut -d' ' -f1)"
if ! "$python" -c "import torch, sys; sys.exit('${torch#torch==}'.split('+')[0] != torch.__version__.split('+')[0])" 2>/dev/null; then
    say "installing $torch for the CPU"
    public="${torch%%+*}"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile "$public+cpu" 2>/dev/null ||
        "$python" -m uv pip install --python "$python" --torch-backend cpu --no-deps "$public" ||
        { echo "$public for the CPU cannot be installed: neither pip's indexes nor PyTorch's CPU index has it" >&2; exit 1; }
fi

say "installing $(grep -c == "$lock") locked packages"
# --no-deps: the lock is complete, and dependency resolution would add the CUDA build of torchvision.
rest="$(mktemp)"
trap 'rm -f "$rest"' EXIT
grep -v '^torch==' "$lock" > "$rest"
"$python" -m uv pip install --quiet --python "$python" --no-deps -r "$rest" ||
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r "$rest"
"$python" -m uv pip install --quiet --python "$python" --no-deps --no-build-isolation --editable . ||
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

say "compiling bytecode (each process of a run starts seconds faster)"
PYTHONWARNINGS=ignore "$python" - <<'PYTHON'
import compileall, sysconfig, re
compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0, rx=re.compile(r"/(tests?|lib2to3)/"))
PYTHON

"$python" -c 'import torch, vllm, ray, transformers, verl' 2>/dev/null ||
    { echo ".venv is incomplete: $("$python" -c 'import torch, vllm, ray, transformers, verl' 2>&1 | tail -n 1)" >&2; exit 1; }
echo "$wanted" > "$stamp"
say "ready: $(du -sh .venv | cut -f1) in .venv"
