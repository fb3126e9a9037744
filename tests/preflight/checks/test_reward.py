import pytest

from verl.config.reward import SCORER_ARGUMENTS
from verl.workers.reward.function import ARGUMENTS


def test_a_missing_file_is_an_error(problem_of):
    text = problem_of(reward__custom_reward_function__path="/nowhere/reward.py")
    assert text.startswith("reward.custom_reward_function.path=/nowhere/reward.py: no such file")


def test_a_missing_function_is_an_error(problem_of):
    text = problem_of(reward__custom_reward_function__name="compute_scores")
    assert "reward.custom_reward_function.name=compute_scores" in text and "did you mean compute_score?" in text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def compute_score(data_source, solution_str, ground_truth, extra_info, bonus=1): ...", "did you mean bonus?"),
        (
            "async def compute_score(data_source, solution_str, ground_truth, extra_info): ...",
            "it has data_source, solu",
        ),
        ("def compute_score(*, solution_str, **others): ...", None),
        ("@wrapped\ndef compute_score(): ...", None),
        ("if True:\n    def compute_score(): ...", None),
    ],
)
def test_a_keyword_without_a_parameter_is_an_error(problem_of, plan_of, run_files, source, words):
    run_files.reward.write_text(source)
    changes = {"reward__custom_reward_function__reward_kwargs": "{bonsu: 2}"}
    if words is None:
        plan_of(**changes)
    else:
        text = problem_of(**changes)
        assert text.startswith("reward.custom_reward_function.reward_kwargs.bonsu: ") and words in text


def test_a_syntax_error_is_an_error(problem_of, run_files):
    run_files.reward.write_text("x = 1\ndef compute_score(:\n    pass\n")
    text = problem_of()
    assert "is not valid Python" in text and "reward.py, line 2" in text


@pytest.mark.parametrize(
    "source",
    [
        "async def compute_score(**sample): ...",
        "from elsewhere import score as compute_score",
        "from elsewhere import *",
        "compute_score = lambda **sample: 0",
        "compute_score: object = None",
        "if True:\n    def compute_score(**sample): ...",
        "try:\n    import a\nexcept ImportError:\n    def compute_score(**sample): ...",
        "class compute_score: ...",
        "def __getattr__(name): ...",
    ],
)
def test_every_kind_of_definition_is_found(plan_of, run_files, source):
    """Does not raise."""
    run_files.reward.write_text(source)
    plan_of()


def test_a_nested_function_is_not_found(problem_of, run_files):
    run_files.reward.write_text("def outer():\n    def compute_score(**sample): ...\n")
    assert "it has outer" in problem_of()


def test_the_file_is_not_run(plan_of, run_files):
    """Does not raise."""
    run_files.reward.write_text("raise SystemExit(3)\ndef compute_score(**sample): ...\n")
    plan_of()


def test_built_in_scorers_need_no_file(plan_of):
    """Does not raise."""
    plan_of(reward__custom_reward_function__path=None)


BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"


def dapo(buffer, **kwargs):
    """Return overrides of the dapo manager; None removes a keyword."""
    values = {"max_resp_len": 16, "overlong_buffer_cfg": buffer} | kwargs
    text = ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    return {"reward__reward_manager__name": "dapo", "reward__reward_kwargs": "{" + text + "}"}


@pytest.mark.parametrize(
    ("buffer", "kwargs", "start", "fix"),
    [
        (
            "{enable: True, len: 4}",
            {"max_resp_len": None},
            "reward.reward_kwargs.max_resp_len is not set",
            "max_response",
        ),
        ("{enable: True, len: 4}", {"max_resp_len": 0}, "reward.reward_kwargs.max_resp_len=0", "max_response_length"),
        ("{enable: True, len: 4}", {"max_resp_len": 17}, "reward.reward_kwargs.max_resp_len=17", "use at most 16"),
        ("{enable: True}", {}, f"{BUFFER}.len is not set", "at least 1"),
        ("{enable: True, len: 0}", {}, f"{BUFFER}.len=0", "at least 1"),
        ("{enable: True, len: 1.5}", {}, f"{BUFFER}.len=1.5", "at least 1"),
        ("{enable: True, len: 17}", {}, f"{BUFFER}.len=17: must be at most", "use at most 16"),
        ("{enable: True, len: 4, penalty_factor: -1}", {}, f"{BUFFER}.penalty_factor=-1", "at least 0"),
        ("{enable: True, len: 4, penalty_factor: .inf}", {}, f"{BUFFER}.penalty_factor=inf", "at least 0"),
        ("{enable: True, len: 4, penalty_factor: x}", {}, f"{BUFFER}.penalty_factor=x", "must be a number"),
        ("{enable: 1, len: 4}", {}, f"{BUFFER}.enable=1", "True or False"),
        ("{enable: True, len: 4, log: 1}", {}, f"{BUFFER}.log=1", "True or False"),
        ("{enable: True, lenn: 4}", {}, f"unknown key '{BUFFER}.lenn'", f"did you mean '{BUFFER}.len'?"),
        ("3", {}, f"{BUFFER}=3", "this is a section"),
    ],
)
def test_an_invalid_overlong_buffer_is_an_error(problem_of, buffer, kwargs, start, fix):
    text = problem_of(**dapo(buffer, **kwargs))
    assert text.startswith(start) and fix in text


@pytest.mark.parametrize(
    "buffer",
    [
        "{enable: True, len: 4, penalty_factor: 0.5, log: True}",
        "{enable: True, len: 16}",
        "{enable: False, len: 0}",
        None,
    ],
)
def test_a_valid_overlong_buffer_has_a_plan(plan_of, buffer):
    """Does not raise."""
    plan_of(**dapo(buffer))


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        (None, ("without", f"{BUFFER}.enable=True")),
        ("{enable: False, len: 4}", ("without", f"{BUFFER}.enable=True")),
        ("{enable: True, len: 4, penalty_factor: 0}", ("with", f"{BUFFER}.penalty_factor=0")),
    ],
)
def test_dapo_without_a_penalty_is_a_note(plan_of, buffer, words):
    (note,) = [note for note in plan_of(**dapo(buffer)).notes if "reward_manager.name=dapo" in note]
    assert all(word in note for word in words), note
    plan = plan_of(**dapo("{enable: True, len: 4}"))
    assert not [note for note in plan.notes if "reward_manager.name=dapo" in note]


def test_the_overlong_buffer_is_unused_without_dapo(plan_of):
    changes = dapo("{enable: True, len: 999}") | {"reward__reward_manager__name": "naive"}
    notes = plan_of(**changes).notes
    assert f"no effect with reward.reward_manager.name=naive: reward.reward_kwargs.max_resp_len, {BUFFER}" in notes


def test_a_keyword_with_two_values_is_an_error(problem_of, run_files):
    run_files.reward.write_text("def compute_score(**sample): ...")
    own = "reward__custom_reward_function__reward_kwargs"
    text = problem_of(**{"reward__reward_kwargs": "{a: 1, b: 2}", own: "{a: 3, b: 2}"})
    assert text.startswith("reward.custom_reward_function.reward_kwargs.a=3: reward.reward_kwargs.a is 1")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def compute_score(text, truth): ...", "has no parameter data_source, solution_str, ground_truth, extra_info"),
        ("def compute_score(data_source, solution_str, ground_truth): ...", "has no parameter extra_info"),
        (
            "async def compute_score(data_source, solution_str, ground_truth, extra_info, client): ...",
            "requires client, which nothing sets",
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info=None, *, judge): ...",
            "requires judge, which nothing sets",
        ),
        (
            "def compute_score(data_source, /, solution_str, ground_truth, extra_info): ...",
            "has no parameter data_source and requires data_source",
        ),
    ],
)
def test_a_wrong_signature_is_an_error_with_the_right_one(problem_of, run_files, source, words):
    run_files.reward.write_text(source)
    problem = problem_of()
    assert words in problem
    assert "write def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)" in problem


def test_a_required_keyword_of_reward_kwargs_is_no_error(plan_of, run_files):
    run_files.reward.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info, a, b): ...")
    plan_of(reward__custom_reward_function__reward_kwargs="{a: 1}", reward__reward_kwargs="{b: 2}")


def test_the_arguments_are_those_of_the_workers():
    assert SCORER_ARGUMENTS == ARGUMENTS
