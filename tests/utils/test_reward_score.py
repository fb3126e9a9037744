"""The scorer of a data source, and the imports of the package."""

import subprocess
import sys

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
