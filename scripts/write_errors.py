"""Writes docs/errors.md, the text of every error that verl raises, from the source: `make reference`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
# By where an error comes from, the first that fits; in the order of the page.
AREAS = {
    "Config": ("verl/trainer/config/", "verl/trainer/main_ppo.py", "hydra_plugins/"),
    "Command line and reports": ("verl/cli/", "verl/report/"),
    "Data and tokenizers": ("verl/utils/dataset/", "verl/utils/tokenizer", "verl/utils/proto", "verl/protocol.py"),
    "Rewards": ("verl/workers/reward/", "verl/utils/reward_score/", "verl/trainer/ppo/rewards_to_advantages.py"),
    "Quantization": ("verl/workers/rollout/quantization/", "verl/utils/quantization/", "verl/utils/vllm/"),
    "Weight updates": ("verl/workers/weight_sync/",),
    "Rollout, agent loops and tools": ("verl/workers/rollout/", "verl/agent_loop/", "verl/tools/"),
    "Training": ("verl/trainer/ppo/", "verl/workers/", "verl/single_controller/"),
    "Everything else": ("verl/",),
}
HEAD = """# Errors

The text of every error that verl raises, written by `make reference` from the source, to be searched: what stands in
braces is filled in. Errors of a config (`verl: the config cannot work`, exit status 2) come all at once and before any
process starts; `verl check` shows the same ones. An error during a run ends it with the cause on the screen, exit
status 1, and the last whole checkpoint stays.
"""


def messages(source: str) -> Iterator[str]:
    """Texts of what is raised, or collected as an error of the config, in the order of the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            called = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("errors.append"):
            called = node
        else:
            continue
        for argument in called.args:
            yield from (text for text in _texts(argument) if " " in text.strip())


def _texts(node: ast.expr) -> Iterator[str]:
    """Every text that an expression may be."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.List | ast.Tuple):
        for item in node.elts:
            yield from _texts(item)
    elif (text := _text(node)) is not None:
        yield text


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
        )
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        if left is None and right is None:
            return None
        return (left or f"{{{ast.unparse(node.left)}}}") + (right or f"{{{ast.unparse(node.right)}}}")
    return None


def page() -> str:
    """The whole page."""
    found: dict[str, list[tuple[str, str]]] = {area: [] for area in AREAS}
    for path in sorted((ROOT / "verl").rglob("*.py")) + sorted((ROOT / "hydra_plugins").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        area = next(area for area, prefixes in AREAS.items() if name.startswith(prefixes))
        found[area] += [(text, name) for text in messages(path.read_text(encoding="utf-8"))]
    sections = []
    for area, rows in found.items():
        lines = [f"- `` {' '.join(text.split())} `` ({name})" for text, name in sorted(set(rows))]
        if lines:
            sections.append("\n".join([f"## {area}", "", *lines]))
    return "\n\n".join([HEAD.rstrip(), *sections]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
