"""Agent loops in processes of their own: the same samples as in the driver, and the same errors."""

import asyncio
import os

import psutil
import pytest

from fixtures.tiny import write_char_tokenizer
from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import SampleGenerator
from verl.agent_loop.loop_pool import LoopWorkerDied
from verl.config import PPOConfig
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.reward import RewardResult
from verl.workers.rollout.types import NoReplicaLeft, TokenOutput

pytestmark = pytest.mark.slow

OWN = '''
import asyncio
import os
from collections import Counter
from pathlib import Path

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput


class OwnError(Exception):
    def __init__(self, uid, reason):
        super().__init__(f"{uid}: {reason}")


class Output(AgentLoopOutput):
    pass


class Counting(AgentLoopBase):
    """Two turns, each with the number of the sample of its prompt as seed."""

    def __init__(self, *arguments, samples, folder):
        super().__init__(*arguments)
        self.samples, self.folder = samples, Path(folder)

    @classmethod
    def setup(cls, tokenizer, config):
        if config.data.max_response_length == 1:
            raise ValueError("responses of one token are too short")
        return {"samples": Counter()}

    async def run(self, sampling_params, **row):
        uid = row["uid"]
        self.samples[uid] += 1
        if row.get("fails") == "own":
            raise OwnError(uid, "a loop failed")
        if row.get("fails") == "exit":
            os._exit(3)
        ids = list(row["prompt_token_ids"])
        params = {**sampling_params, "seed": self.samples[uid]}
        try:
            first = await self.client.generate(ids, params, session=uid)
            tool = self.tokenizer.encode("=", add_special_tokens=False)
            second = await self.client.generate(ids + first.token_ids + tool, params, session=uid)
        except asyncio.CancelledError:
            (self.folder / f"cancelled {uid}").touch()
            raise
        return Output(
            ids,
            first.token_ids + tool + second.token_ids,
            [1] * len(first.token_ids) + [0] * len(tool) + [1] * len(second.token_ids),
            extra_fields={"pid": os.getpid(), "params": params},
        )
'''


class Client:
    """Replicas whose response depends on the prompt and the seed; a long prompt finishes first."""

    def __init__(self):
        self.sessions, self.cancelled, self.waiting = [], 0, asyncio.Event()

    async def generate(self, prompt_ids, sampling_params, *, session=None):
        if sampling_params.get("stop") == "dead":
            raise NoReplicaLeft("none of 2 replica(s) responds")
        if sampling_params.get("stop") == "never":
            try:
                self.waiting.set()
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        for _ in range(20 - len(prompt_ids)):
            await asyncio.sleep(0)
        self.sessions.append(session)
        return TokenOutput([sum(prompt_ids) % 50 + 4, sampling_params["seed"] + 4], [-0.5, -1.5])


class Rewards:
    async def score(self, *arguments, **keywords):
        return RewardResult(1.0, {}, None, 0.0)


@pytest.fixture
def generator(tmp_path):
    """Return `generator(workers, client)`: a `SampleGenerator` that runs the loop of this file."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "loops.yaml").write_text(f"- {{name: counting, _target_: own.py:Counting, folder: {tmp_path}}}")
    path = str(write_char_tokenizer(tmp_path / "model"))
    made = []

    def make(workers, client=None, response_length=64):
        config = PPOConfig()
        config.actor_rollout_ref.model.path = path
        config.data.max_response_length = response_length
        agent = config.actor_rollout_ref.rollout.agent
        agent.num_workers, agent.default_agent_loop = workers, "counting"
        agent.agent_loop_config_path = str(tmp_path / "loops.yaml")
        made.append(SampleGenerator(client or Client(), hf_tokenizer(path), Rewards(), config))
        return made[-1]

    yield make
    for each in made:
        pids = each._pool.pids() if each._pool else []
        each.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


async def outputs_of(generator, rows, params=None):
    samples, _ = await generator.generate(rows, params or {})
    return [sample.output for sample in samples]


def rows(prompts=6, samples=3, **more):
    row = {"data_source": "d", "reward_model": {}, "raw_prompt": []}
    return [
        {**row, "uid": f"1.{i}", "prompt_token_ids": list(range(5, 7 + i)), **more}
        for i in range(prompts)
        for _ in range(samples)
    ]


def plain(output):
    extra = {name: value for name, value in output.extra_fields.items() if name != "pid"}
    return output.response_ids, output.response_mask, extra


async def test_several_processes_generate_the_samples_of_one(generator):
    expected = [plain(output) for output in await outputs_of(generator(0), rows())]
    client = Client()
    outputs = await outputs_of(generator(2, client), rows())
    assert [plain(output) for output in outputs] == expected
    assert all(type(output) is AgentLoopOutput for output in outputs), "a class of the user stays in its process"
    pids = [output.extra_fields["pid"] for output in outputs]
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert all(len(set(pids[i : i + 3])) == 1 for i in range(0, 18, 3)), "the samples of a prompt are in one process"
    assert sorted(client.sessions) == sorted(row["uid"] for row in rows() for _ in range(2))


async def test_errors_and_cancellations_reach_the_other_process(generator, tmp_path):
    client = Client()
    made = generator(1, client)
    with pytest.raises(RuntimeError, match=r"OwnError: 1\.0: a loop failed"):
        await outputs_of(made, rows(fails="own"))
    with pytest.raises(NoReplicaLeft, match="none of 2"):
        await outputs_of(made, rows(), {"stop": "dead"})
    with pytest.raises(TypeError, match="a row cannot be sent to another process"):
        await outputs_of(made, rows(helper=lambda: 0))
    task = asyncio.ensure_future(outputs_of(made, rows(prompts=1, samples=1), {"stop": "never"}))
    await client.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(60):
        while not client.cancelled or not (tmp_path / "cancelled 1.0").exists():
            await asyncio.sleep(0.01)
    assert len(await outputs_of(made, rows())) == 18, "it still works"
    for _ in range(2):
        with pytest.raises(LoopWorkerDied, match=r"agent loop worker 0 ended while .* \(exit code 3\)"):
            await outputs_of(made, rows(fails="exit"))


async def test_errors_of_the_start_are_those_of_the_loop(generator):
    with pytest.raises(ValueError, match="responses of one token are too short"):
        await generator(1, response_length=1).start()
