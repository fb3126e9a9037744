#!/usr/bin/env bash
# Resolves requirements/cpu.lock again from pyproject.toml (extras cpu and dev). Run it after a change of dependencies.
# Locked packages keep their versions if possible; with --upgrade they get the newest ones. The CPU build of torch comes
# from PIP_FIND_LINKS if it is set, otherwise from PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || { echo "no .venv: run scripts/setup.sh first" >&2; exit 1; }
"$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv
if [ -n "${PIP_FIND_LINKS:-}" ]; then torch=(--find-links "$PIP_FIND_LINKS"); else torch=(--torch-backend cpu); fi
new=requirements/cpu.lock.new
trap 'rm -f "$new"' EXIT
cp requirements/cpu.lock "$new"
"$python" -m uv pip compile pyproject.toml --extra cpu --extra dev --universal --python-version 3.11 \
    --override requirements/overrides.txt "${torch[@]}" --no-annotate --no-header --quiet --output-file "$new" "$@"
grep -vE "^(torchvision|torchaudio|torchcodec|triton)==|sys_platform == '(win32|emscripten)'" "$new" > requirements/cpu.lock
echo "$(grep -c == requirements/cpu.lock) packages locked"
