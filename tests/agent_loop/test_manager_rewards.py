"""Reward managers in upstream verl's style: real samples, real reward workers, no engine."""

import asyncio
import sys
import textwrap
import threading

import pytest
import torch

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.agent_loop.generation import SampleGenerator, to_batch
from verl.agent_loop.metrics import compute_agent_metrics
from verl.config import CustomRewardFunctionConfig, PPOConfig
from verl.experimental.reward_loop.reward_manager import register as register_manager
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.workers.reward import RewardLoop
from verl.workers.reward_manager.abstract import AbstractRewardManager

SHORT = 1.0  # time limit in seconds

COUNT = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    if "z" in solution_str:
        raise KeyError("z")
    return {"score": float(len(solution_str)), "turns": extra_info["num_turns"]} if ground_truth else 1.0
"""


@register("echo_for_managers")
class Echo(AgentLoopBase):
    async def run(self, sampling_params, **row):
        ids = row["response_ids"]
        fields = {"reward_score": row.get("own_score"), "metrics": {"waited": float(len(ids))}}
        return AgentLoopOutput(
            prompt_ids=[7], response_ids=ids, response_mask=[1] * len(ids), response_logprobs=None, **fields
        )


class Letters:
    pad_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + int(i)) for i in ids)


def response_text(manager, data):
    item = data[0]
    ids = item.batch["responses"]
    length = int(item.batch["attention_mask"][-ids.shape[-1] :].sum())
    return item, manager.tokenizer.decode(ids[:length])


@register_manager("half")
class Half(RewardManagerBase):
    async def run_single(self, data):
        item, text = response_text(self, data)
        assert item.non_tensor_batch["__num_turns__"] == 2 and self.config.get("data") is self.config.data
        result = await self.compute_score(
            data_source=item.non_tensor_batch["data_source"],
            solution_str=text,
            ground_truth=item.non_tensor_batch["reward_model"]["ground_truth"],
            extra_info=item.non_tensor_batch["extra_info"],
        )
        score = result["score"] if isinstance(result, dict) else result
        length = await self.loop.run_in_executor(None, len, text)
        return {"reward_score": score / 2, "reward_extra_info": {"score": score, "length": length}}


class InTensor(AbstractRewardManager):
    positions = (0,)

    def __init__(self, tokenizer, num_examine, compute_score, reward_fn_key="data_source", max_resp_len=None, **kwargs):
        self.tokenizer, self.compute_score, self.key, self.max_resp_len = (
            tokenizer,
            compute_score,
            reward_fn_key,
            max_resp_len,
        )

    def __call__(self, data, return_dict=False):
        rewards = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        item, text = response_text(self, data)
        row = item.non_tensor_batch
        score = self.compute_score(row[self.key], text, row["reward_model"]["ground_truth"], row["extra_info"])
        for position in self.positions:
            rewards[0, position] = score["score"]
        return {"reward_tensor": rewards, "reward_extra_info": {"limit": [self.max_resp_len]}}


register_manager("in_tensor")(InTensor)


@register_manager("at_every_token")
class AtEveryToken(InTensor):
    positions = (0, 1)


class OfEachKind:
    """A manager of either kind whose reward of response 9 is what `act` does; other rewards are 1."""

    def act(self):
        raise NotImplementedError

    async def act_in_steps(self):
        await asyncio.sleep(0)
        self.act()

    async def run_single(self, data):
        if int(data.batch["responses"][0, 0]) == 9:
            await self.act_in_steps()
        await asyncio.sleep(0)
        return {"reward_score": 1.0, "reward_extra_info": {"step": 4}}

    def __call__(self, data, return_dict=False):
        if int(data.batch["responses"][0, 0]) == 9:
            self.act()
        return torch.ones(1, 1)


class Hang:
    def act(self):
        threading.Event().wait()


class Exit:
    def act(self):
        sys.exit(3)


class NeverAnswered:
    async def act_in_steps(self):
        await asyncio.get_running_loop().create_future()


class TensorInit:
    def __init__(self, tokenizer, num_examine, compute_score, **kwargs):
        pass


for kind, act in (("hang", Hang), ("exit", Exit), ("never", NeverAnswered)):
    register_manager(f"{kind}_async")(type("Async", (act, OfEachKind, RewardManagerBase), {}))
    if kind != "never":
        register_manager(f"{kind}_thread")(type("Thread", (act, OfEachKind, TensorInit, AbstractRewardManager), {}))


def results(tmp_path, manager, responses, truth="t", timeout=30.0, function=COUNT, **row):
    path = tmp_path / "reward.py"
    path.write_text(textwrap.dedent(function))
    config = PPOConfig()
    config.reward.timeout = timeout
    config.reward.custom_reward_function = CustomRewardFunctionConfig(path=str(path))
    config.reward.reward_manager.name, config.reward.num_workers = manager, 1
    config.reward.reward_kwargs = {"max_resp_len": 9}
    config.actor_rollout_ref.rollout.agent.default_agent_loop = "echo_for_managers"
    rewards = RewardLoop(config.reward)
    try:
        generator = SampleGenerator(None, Letters(), rewards, config)
        rows = [
            {"uid": str(i), "data_source": "d", "reward_model": {"ground_truth": truth}, "raw_prompt": [], **row}
            | {"prompt_token_ids": [7], "response_ids": ids}
            for i, ids in enumerate(responses)
        ]
        return asyncio.run(generator.generate(rows, {}))[0]
    finally:
        rewards.close()


def test_a_manager_of_the_user_computes_the_reward(tmp_path):
    first, second = results(tmp_path, "half", [[1, 2, 3], [4]])
    assert (first.reward.score, second.reward.score) == (1.5, 0.5)
    assert first.reward.extra == {"score": 3.0, "length": 3} and first.reward.error is None
    batch = to_batch([first, second], pad_token_id=0, with_log_probs=False)
    assert batch.batch["token_level_scores"].tolist() == [[0, 0, 1.5], [0.5, 0, 0]]
    assert list(batch.non_tensor_batch["score"]) == [3.0, 1.0]
    assert compute_agent_metrics(batch)["agent_loop/waited/mean"] == 2.0


def test_the_scorer_of_a_manager_returns_numbers_as_numbers(tmp_path):
    (sample,) = results(tmp_path, "half", [[1, 2, 3]], truth=None)
    assert sample.reward.score == 0.5


def test_a_manager_of_earlier_versions_runs_in_a_thread(tmp_path):
    (sample,) = results(tmp_path, "in_tensor", [[1, 2, 3]])
    assert sample.reward.score == 3.0 and sample.reward.extra == {"limit": 9}


def test_an_error_of_the_scorer_is_an_error_of_the_sample(tmp_path):
    good, bad = results(tmp_path, "half", [[1], [25]])
    assert good.reward.error is None and bad.reward.error == "exception" and "KeyError" in bad.reward.detail


def test_rewards_at_several_tokens_are_refused(tmp_path):
    (sample,) = results(tmp_path, "at_every_token", [[1, 2]])
    assert sample.reward.error == "bad_return" and "one at one token" in sample.reward.detail


def test_a_reward_of_the_loop_replaces_the_manager(tmp_path):
    (sample,) = results(tmp_path, "half", [[25]], own_score=0.25)
    assert sample.reward.score == 0.25 and sample.reward.error is None
    (sample,) = results(tmp_path, "half", [[25]], own_score=float("nan"))
    assert sample.reward.error == "bad_return"


@pytest.mark.parametrize("manager", ["never_async", "hang_async", "hang_thread"])
def test_a_manager_that_hangs_costs_its_own_sample_the_reward(tmp_path, caplog, manager):
    """`hang_async` blocks the event loop that it shares with the other samples."""
    samples = results(tmp_path, manager, [[1], [2], [9], [3], [4]], timeout=SHORT)
    assert [sample.reward.error for sample in samples] == [None, None, "timeout", None, None]
    assert [sample.reward.score for sample in samples] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert f"{manager}: no reward within reward.timeout={SHORT:g} s" in samples[2].reward.detail
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "timeout while scoring a sample of data_source=d" in record.getMessage()


@pytest.mark.parametrize("manager", ["exit_async", "exit_thread"])
def test_a_manager_that_ends_its_process_costs_its_own_sample_the_reward(tmp_path, manager):
    samples = results(tmp_path, manager, [[1], [9], [3]])
    assert [sample.reward.error for sample in samples] == [None, "exception", None]
    assert "SystemExit(3)" in samples[1].reward.detail


@pytest.mark.parametrize("manager", ["half", "in_tensor"])
def test_the_scorers_queue_does_not_count_toward_the_limit_of_a_manager(tmp_path, manager):
    function = """
    import time
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        time.sleep(0.1)
        return {"score": 1.0}
    """
    samples = results(tmp_path, manager, [[1]] * 15, timeout=SHORT, function=function)  # longer than SHORT in all
    assert [sample.reward.error for sample in samples] == [None] * 15


def test_a_reserved_name_in_the_extra_values_of_a_manager_is_renamed(tmp_path, caplog):
    (sample,) = results(tmp_path, "exit_async", [[1]])
    assert sample.reward.extra == {"extra_step": 4}
    assert "the extra value 'step'" in caplog.text


def test_managers_that_cannot_be_used_are_errors(tmp_path):
    with pytest.raises(ValueError, match="built in"):
        register_manager("naive")
    with pytest.raises(TypeError, match="must be a subclass of RewardManagerBase"):
        register_manager("no_base")(Letters)
    with pytest.raises(ValueError, match="assemble_rm_scores"):
        register_manager("uncalled")(type("Mine", (Half,), {"assemble_rm_scores": None}))

    @register_manager("broken")
    class Broken(RewardManagerBase):
        def __init__(self, config, tokenizer):
            pass

        async def run_single(self, data):
            return {}

    with pytest.raises(ValueError, match=r"reward_manager.name=broken: .*Broken cannot be constructed: TypeError"):
        results(tmp_path, "broken", [[1]])
