"""The calculator example with a real engine: training separates the model's tokens from the tool's."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tool_agent"
# Enough training for the model to write calls that the parser finds; their arguments may be wrong.
SHORT = dict(train_rows=32, test_rows=8, warm_steps=60, warm_batch=16, calls=0.8, warm_lr=4e-3)
# A call to add two numbers and the response of the tool. A model this small also writes single marks of a call or of a
# response where none belongs, so that one mark alone proves nothing.
SUM_WITH_RESPONSE = re.compile(
    r'"expression": "([1-9]\d*)\+([1-9]\d*)"}}</tool_call><tool_response>([^<]*)</tool_response>='
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_address):
    spec = importlib.util.spec_from_file_location("example_tool_agent_prepare", EXAMPLE / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = tmp_path_factory.mktemp("tool_agent")
    script.prepare(root / "prepared", script.Settings(**SHORT))
    run = TinyRun(root, ray_address)
    run.run(
        actor_rollout_ref__model__path=root / "prepared" / "model",
        data__train_files=root / "prepared" / "train.parquet",
        data__val_files=root / "prepared" / "test.parquet",
        data__max_prompt_length=32,
        data__max_response_length=48,
        reward__custom_reward_function__path=EXAMPLE / "reward.py",
        actor_rollout_ref__rollout__agent__default_agent_loop="tool_agent",
        actor_rollout_ref__rollout__agent__num_workers=2,
        actor_rollout_ref__rollout__multi_turn__enable=True,
        actor_rollout_ref__rollout__multi_turn__tool_config_path=EXAMPLE / "tool_config.yaml",
        actor_rollout_ref__rollout__multi_turn__max_assistant_turns=3,
        trainer__rollout_data_dir=root / "dumps",
        trainer__total_training_steps=2,
        trainer__test_freq=2,
    )
    return run


def dumped(run):
    return [json.loads(line) for path in sorted((run.root / "dumps").glob("*.jsonl")) for line in path.open()]


def test_engine_and_trainer_agree_on_model_tokens_and_tool_tokens_are_masked(run):
    data = run.metrics()
    assert sorted(data) == [1, 2]
    for step in (1, 2):
        # Tool tokens have log-probability 0: if they were compared, this would be near 1.
        assert data[step]["training/rollout_probs_diff_max"] < 1e-4
        assert data[step]["training/rollout_probs_diff_valid"] == 1
        assert data[step]["tool_call_counts/max"] >= 1 and data[step]["num_turns/max"] >= 4
        assert data[step]["num_turns/max"] <= 6


def test_the_text_contains_the_response_of_the_tool(run):
    texts = [sample["output"] for sample in dumped(run)]
    sums = [answered for text in texts if (answered := SUM_WITH_RESPONSE.search(text))]
    assert len(texts) == 64 and sums
    for answered in sums:
        first, second, response = answered.groups()
        assert response == str(int(first) + int(second))


def test_the_reward_function_gets_the_number_of_calls(run):
    for sample in dumped(run):
        # A call whose response did not fit is in the text without the response.
        if SUM_WITH_RESPONSE.search(sample["output"]):
            assert sample["used_tool"] == 1.0
        if "</tool_call>" not in sample["output"]:
            assert sample["used_tool"] == 0.0
    validation = run.metrics()[2]
    assert any(name.startswith("val-") and "used_tool" in name for name in validation)
