"""The probe of the reward function: right functions, certain faults (errors), and possible faults (warnings)."""

import pytest

from fixtures.script import row
from verl.trainer.probes.reward import TOOL_FIELDS
from verl.workers.reward.loop import RESERVED_NAMES

HEAD = "def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):\n    "
INFO = {"extra_info": {"level": 3, "nested": {"a": 1}}}


@pytest.mark.parametrize(
    "source",
    [
        HEAD + "return float(solution_str == ground_truth == '4')",
        HEAD + "return {'score': 1, 'acc': True, 'level': extra_info['level'] + extra_info['nested']['a']}",
        HEAD + "return {'score': extra_info['num_turns'], **extra_info}",
        HEAD + "return {'score': len(extra_info.get('absent', '')), 'source': data_source[:3]}",
        "async " + HEAD + "return 0.5",
        "async def later():\n    return 1\n" + HEAD + "return later()",
        "class Score:\n    def __call__(self, **sample):\n        return 1\ncompute_score = Score()",
    ],
)
def test_a_right_function_has_no_finding(run, source):
    run.script.rows([row(**INFO)] * 4)
    run.keys["data.val_files"] = run.script.train
    run.reward(source)
    found = run.probe("reward")
    assert found.problems == []
    assert [text.rpartition("with ")[2] for text in found.of("step")[1:]] == [
        f"{run.script.train}, row 0 (counted from 0)"
    ] * 2


def test_keywords_are_passed(run):
    run.reward(HEAD + "return kwargs['bonus'] * 2", **{"+reward__custom_reward_function__reward_kwargs": "{bonus: 2}"})
    assert run.probe("reward").problems == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def compute_score(solution_str):\n    return 1", "cannot be called with the keywords"),
        ("x = 1", "compute_score does not exist"),
        ("import nothing_of_this_name", "does not import (my_reward.py, line 1): ModuleNotFoundError"),
        ("exit(3)", "does not import (my_reward.py, line 1): SystemExit: 3"),
        ("raise KeyboardInterrupt", "does not import (my_reward.py): ImportError: the module raised Keyboard"),
        ("compute_score = 5", "compute_score is not a function in"),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info, /): return 1",
            "cannot be called with",
        ),
        (HEAD + "return None", "returned None (NoneType) as the score"),
        (HEAD + "return '1'", "returned '1' (str) as the score"),
        (HEAD + "return [1.0]", "returned [1.0] (list) as the score"),
        (HEAD + "return {'acc': 1.0}", "returned a dict without 'score' (keys: acc)"),
        (HEAD + "pass", "returned None"),
        (HEAD + "return extra_info['difficulty']", "reads extra_info['difficulty'], which the row does not have"),
        (HEAD + "return extra_info['nested']['b']", "reads extra_info['nested']['b'], which the row does not have"),
    ],
)
def test_a_certain_fault_is_an_error(run, source, words):
    run.script.rows([row(**INFO)] * 4)
    run.keys["data.val_files"] = run.script.train
    run.reward(source)
    found = run.probe("reward")
    errors = found.of("error")
    assert len(errors) in (1, 2) and found.problems == [("error", text) for text in errors]
    assert all(words in text and "my_reward.py" in text for text in errors), errors


@pytest.mark.slow
def test_an_error_names_row_file_and_line(run):
    run.script.rows([row(**INFO)] * 4)
    run.reward("\n" + HEAD + "return extra_info['difficulty']")
    text = run.probe("reward").of("error")[0]
    file = run.root / "my_reward.py"
    assert text.startswith(
        f"reward.custom_reward_function.path={file}: compute_score with {run.script.train}, row 0 (counted from 0) "
    )
    assert f"({file}, line 3); it has level, nested, num_turns" in text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (HEAD + "raise ConnectionError('no service')", "ConnectionError: no service"),
        (HEAD + "return {'a': 1}[solution_str]", "KeyError: '4'"),
        (HEAD + "raise SystemExit(3)", "SystemExit: 3"),
        (HEAD + "return float('nan')", "returned the score nan"),
        (HEAD + "return {'score': 1, 'other': object()}", "stored as text"),
    ],
)
def test_a_possible_fault_is_a_warning(run, source, words):
    run.reward(source)
    found = run.probe("reward")
    assert found.of("error") == [] and len(found.of("warning")) == 2
    assert words in found.of("warning")[0]


@pytest.mark.parametrize("loop", ["tool_agent", "mine"])
def test_other_agent_loops_may_add_the_missing_key(run, loop):
    run.reward(HEAD + "return extra_info['from_a_tool']")
    if loop == "tool_agent":
        run.keys["actor_rollout_ref.rollout.agent.default_agent_loop"] = loop
    else:
        run.script.rows([row(agent_name=loop)] * 4)
        run.keys["data.val_files"] = run.script.train
    found = run.probe("reward")
    assert found.of("error") == [] and "reads extra_info['from_a_tool']" in found.of("warning")[0]


def test_values_of_the_tool_loop_are_known(run):
    run.reward(HEAD + "return extra_info['tool_call_counts'] + sum(extra_info['tool_rewards'])")
    run.keys["actor_rollout_ref.rollout.agent.default_agent_loop"] = "tool_agent"
    assert run.probe("reward").problems == []
    # Columns of the tool loop are reserved, see there.
    assert TOOL_FIELDS.keys() == {name for name in RESERVED_NAMES if name.startswith(("tool_", "rollout_reward"))}


def test_a_package_that_is_missing_here_may_exist_elsewhere(run):
    run.reward("import nothing_of_this_name")
    found = run.probe("reward", elsewhere=True)
    assert found.of("error") == [] and "ModuleNotFoundError" in found.of("warning")[0]


def test_without_rows_the_function_is_only_loaded(run):
    run.reward(HEAD + "return None")
    found = run.probe("reward", with_samples=False)
    assert [name for name, _ in found.problems] == ["note"] and "not called" in found.of("note")[0]


def test_components_of_gdpo_are_required(run):
    run.keys |= {"algorithm.adv_estimator": "gdpo", "algorithm.gdpo_reward_keys": "[format,accuracy]"}
    run.keys["reward.reward_manager.name"] = "gdpo"
    run.reward(HEAD + "return {'score': 1, 'accuracy': 1.0}")
    assert "returned no format for a sample" in run.probe("reward").of("error")[0]
    run.reward(HEAD + "return {'score': 1, 'accuracy': 1.0, 'format': 0.0}", "right.py")
    assert run.probe("reward").problems == []


def test_the_metric_of_dynamic_sampling_is_required(run):
    run.keys |= {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "accuracy"}
    run.reward(HEAD + "return 1.0")
    text = run.probe("reward").of("error")[0]
    assert text.startswith("algorithm.filter_groups.metric=accuracy: ") and "seq_reward" in text and "acc" in text
    run.reward(HEAD + "return {'score': 1.0, 'accuracy': 0.5}", "right.py")
    assert run.probe("reward").problems == []
