#!/usr/bin/env bash
# Re-resolves requirements/cpu.lock from pyproject.toml (extras cpu and dev). Run it after changing dependencies; what is
# locked keeps its version where it can, or with --upgrade takes the newest.
# The CPU build of torch comes from PIP_FIND_LINKS where that is set, and from PyTorch's CPU index otherwise.
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
