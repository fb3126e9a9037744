#!/usr/bin/env bash
# Creates .cache/trl, the environment in which benchmarks/grpo_step.py runs TRL: the packages of requirements/trl.txt,
# and links to the other packages of .venv. Both sides of the comparison thus use the same torch and transformers.
# Excluded are this project and vLLM, which TRL would import. Does nothing if the environment exists and is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted="$(cat requirements/trl.txt requirements/cpu.lock "$0" | sha256sum | cut -d' ' -f1)"
home=.cache/trl
if [ -f "$home/.fits" ] && [ "$(cat "$home/.fits")" = "$wanted" ]; then exit 0; fi

echo "==> creating $home with $(sed -n 's/^trl==/TRL /p' requirements/trl.txt)"
rm -rf "$home"
"$(.venv/bin/python -c 'import sys; print(sys._base_executable)')" -m venv --without-pip "$home"
.venv/bin/python -m uv pip install --quiet --python "$home/bin/python" --no-deps -r requirements/trl.txt

mkdir "$home/shared"
for path in .venv/lib/python*/site-packages/*; do
    case "${path##*/}" in
        verl* | vllm* | __editable__* | __pycache__ | *.pth) ;;
        *) ln -s "$PWD/$path" "$home/shared/" ;;
    esac
done
# The links come after the environment's own packages on sys.path, so that its own packages take precedence.
echo "$PWD/$home/shared" > "$(echo "$home"/lib/python*/site-packages)/shared.pth"

"$home/bin/python" -c 'from trl import GRPOConfig, GRPOTrainer'
echo "$wanted" > "$home/.fits"
