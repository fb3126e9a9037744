import pytest


def test_no_such_file(problem_of):
    text = problem_of(reward__custom_reward_function__path="/nowhere/reward.py")
    assert text.startswith("reward.custom_reward_function.path=/nowhere/reward.py: no such file")


def test_no_such_function(problem_of):
    text = problem_of(reward__custom_reward_function__name="compute_scores")
    assert "reward.custom_reward_function.name=compute_scores" in text and "did you mean compute_score?" in text


def test_a_file_that_does_not_compile(problem_of, run_files):
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
def test_every_way_to_define_the_name(plan_of, run_files, source):
    run_files.reward.write_text(source)
    plan_of()


def test_a_name_inside_a_function_is_none_of_the_module(problem_of, run_files):
    run_files.reward.write_text("def outer():\n    def compute_score(**sample): ...\n")
    assert "it has outer" in problem_of()


def test_nothing_of_the_file_runs(plan_of, run_files):
    run_files.reward.write_text("raise SystemExit(3)\ndef compute_score(**sample): ...\n")
    plan_of()


def test_the_built_in_scorers_need_no_file(plan_of):
    plan_of(reward__custom_reward_function__path=None)
