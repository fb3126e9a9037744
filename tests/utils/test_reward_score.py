"""The scorer of a data source, and the imports of the package."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from verl.utils.reward_score import default_compute_score, prepare


def test_error_of_an_unknown_data_source_lists_the_known_ones_and_the_custom_function():
    for call in (lambda: default_compute_score("my/data", "a", "b"), lambda: prepare("my/data")):
        with pytest.raises(NotImplementedError) as caught:
            call()
        for part in ("my/data", "openai/gsm8k", "reasoning_gym/<task>", "reward.custom_reward_function.path"):
            assert part in str(caught.value)


def test_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="max_resp_len"):
        default_compute_score("openai/gsm8k", "a", "1", None, max_resp_len=3)


@pytest.mark.parametrize("module", ["verl.utils.reward_score", "verl.workers.reward", "verl.workers.reward.worker"])
def test_import_loads_no_heavy_module(module):
    code = (
        f"import sys, {module}; heavy = ['torch', 'ray', 'vllm', 'transformers', 'numpy', 'sympy', 'math_verify', "
        "'reasoning_gym', 'omegaconf']; found = set(heavy) & set(sys.modules); assert not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


ROOT = Path(__file__).parents[2]
# Each row: data source, response, ground truth, the right score, and the score that upstream verl's scorer gave at
# commit 1dda039b (measured). `reason`: why the right score is another one. `origin`: the public report of the case.
TABLE = [json.loads(line) for line in (ROOT / "tests" / "data" / "reward_answers.jsonl").read_text().splitlines()]
REASONS = ("value", "notation", "unit", "name", "position", "reasoning", "wrong")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['source']}-{row['truth'][:20]}")
def test_the_score_is_the_right_one(row):
    result = default_compute_score(row["source"], row["response"], row["truth"])
    assert (result["score"] if isinstance(result, dict) else result) == row["right"]
    assert (row["upstream"] == row["right"]) is ("reason" not in row)


def test_the_document_has_the_agreement_of_each_scorer_with_upstream():
    text = (ROOT / "docs" / "rewards.md").read_text()
    documented = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, flags=re.MULTILINE)
    counted = []
    for source in dict.fromkeys(row["source"] for row in TABLE):
        rows = [row for row in TABLE if row["source"] == source]
        too_high = sum(row["upstream"] > row["right"] for row in rows)
        too_low = sum(row["upstream"] < row["right"] for row in rows)
        counted.append((source, *map(str, (len(rows), len(rows) - too_high - too_low, too_low, too_high))))
    assert sorted(documented) == sorted(counted)
    reasons = Counter(row["reason"] for row in TABLE if "reason" in row)
    documented_reasons = re.findall(r"^\| (\w+) \| (\d+) \|", text, flags=re.MULTILINE)
    assert dict(documented_reasons) == {name: str(reasons[name]) for name in REASONS}
    assert len({row["truth"] + row["response"] for row in TABLE}) >= 150
