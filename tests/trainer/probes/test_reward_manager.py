"""The probe of a reward manager."""

import pytest

from verl.workers.reward_manager import AbstractRewardManager, RewardManagerBase, register
from verl.workers.reward_manager.registry import REWARD_MANAGERS


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(REWARD_MANAGERS, "_functions", dict(REWARD_MANAGERS._functions))


@pytest.fixture
def probe(run):
    """Return a function that registers a manager with a scorer of 0.5 and returns the findings."""
    run.reward("def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0.5")

    def call(cls):
        register("mine")(cls)
        run.keys["reward.reward_manager.name"] = "mine"
        return run.probe("reward_manager")

    return call


class Right(RewardManagerBase):
    async def run_single(self, data):
        row = data[0].non_tensor_batch
        response = data.batch["responses"][0][data.batch["response_mask"][0] == 1]
        score = await self.compute_score(
            data_source=row["data_source"],
            solution_str=self.tokenizer.decode(response),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row["extra_info"],
        )
        assert score == 0.5
        return {"reward_score": score, "reward_extra_info": {"length": len(response)}}


def test_a_right_manager_has_no_finding(probe):
    assert probe(Right).problems == []


def test_a_right_manager_of_the_earlier_form(probe):
    class Earlier(AbstractRewardManager):
        def __init__(self, tokenizer, num_examine, compute_score, reward_fn_key="data_source"):
            pass

        def __call__(self, data, return_dict=False):
            rewards = data.batch["responses"] * 0.0
            rewards[0, -1] = 1.0
            return {"reward_tensor": rewards}

    assert probe(Earlier).problems == []


def returning(value):
    class Manager(RewardManagerBase):
        async def run_single(self, data):
            return value

    return Manager


class WrongConstructor(Right):
    def __init__(self, config):
        pass


class WrongSignature(Right):
    async def run_single(self):
        return {}


class WrongKey(Right):
    async def run_single(self, data):
        return {"reward_score": data[0].non_tensor_batch["extra_info"]["level"]}


@pytest.mark.parametrize(
    ("cls", "level", "words"),
    [
        (WrongConstructor, "error", "WrongConstructor cannot be constructed: TypeError"),
        (WrongSignature, "error", "WrongSignature cannot be called as run_single(self, data)"),
        (returning(1.0), "error", "run_single returned 1.0; return a dict with reward_score"),
        (returning({"reward_score": None}), "error", "returned None (NoneType) as the score"),
        (WrongKey, "warning", "raised KeyError: 'level'"),
    ],
)
def test_a_wrong_manager(probe, cls, level, words):
    found = probe(cls)
    assert {name for name, _ in found.problems} == {level}, found.problems
    assert found.of(level)[0].startswith("reward.reward_manager.name=mine") and words in found.of(level)[0]
