"""Probe of the reward manager: constructed as in a run, and called with a made-up response to each sample row."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from typing import Any

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import unscored_table
from verl.agent_loop.manager_rewards import ManagerRewards
from verl.trainer.probes.context import Context, Sample
from verl.trainer.probes.reward import load, not_callable, sample_response
from verl.utils.dataset.prompts import prompt_token_ids
from verl.workers.reward import RewardError, RewardLoop
from verl.workers.reward_manager import RewardManagerBase, get_reward_manager_cls

_SCORER_SECONDS = 30.0
"""Limit of the scorer that a manager calls, below the limit of the whole call."""


def probe(context: Context) -> None:
    """Check the signature, construct the manager with the configured scorer, and score each sample."""
    config = context.config
    section = config.reward
    label = f"reward.reward_manager.name={section.reward_manager.name}"
    if section.custom_reward_function.path is not None and load(context)[0] is None:
        return
    if not _has_signature(context, label) or not_callable(context, label):
        return
    tokenizer = context.tokenizer(label)
    if tokenizer is None:
        return
    limited = dataclasses.replace(section, timeout=min(section.time_limit, _SCORER_SECONDS))
    rewards = RewardLoop(limited, num_workers=1, components=config.algorithm.gdpo_reward_keys or ())
    try:
        context.step(f"{label}: its constructor")
        try:
            manager = ManagerRewards(config, tokenizer, rewards)
        except ValueError as error:
            context.failed(error)
            return
        asyncio.run(_score_all(context, manager, tokenizer, label))
    finally:
        rewards.close()


def _has_signature(context: Context, label: str) -> bool:
    """Check that the manager can be called as a run calls it."""
    cls = get_reward_manager_cls(context.config.reward.reward_manager.name)
    try:
        if not issubclass(cls, RewardManagerBase):
            inspect.signature(cls.__call__).bind(None, None, return_dict=True)
            return True
        inspect.signature(cls.run_single).bind(None, None)
    except TypeError as error:
        wanted = "run_single(self, data)" if issubclass(cls, RewardManagerBase) else "__call__(self, data, return_dict)"
        context.error(f"{label}: {cls.__qualname__} cannot be called as {wanted}: {error}")
        return False
    if not inspect.iscoroutinefunction(cls.run_single):
        context.warn(
            f"{label}: {cls.__qualname__}.run_single is not a coroutine function, and a run awaits its result; write "
            "async def run_single"
        )
    return True


async def _score_all(context: Context, manager: ManagerRewards, tokenizer: Any, label: str) -> None:
    for sample in context.samples:
        await _score(context, manager, sample, tokenizer, f"{label} with {sample.name}")


async def _score(context: Context, manager: ManagerRewards, sample: Sample, tokenizer: Any, label: str) -> None:
    data, row = context.config.data, {**sample.row, "uid": "0.0"}
    prompt = row.get("prompt_token_ids")  # the samples of a dataset class have it
    if prompt is None:
        prompt = prompt_token_ids(tokenizer, row["raw_prompt"], data.apply_chat_template_kwargs or {})
    response = tokenizer.encode(sample_response(row), add_special_tokens=False)[: data.max_response_length]
    response = response or [tokenizer.pad_token_id]
    output = AgentLoopOutput(prompt_ids=prompt, response_ids=response, response_mask=[1] * len(response))
    extra_info = {**(row.get("extra_info") or {}), "num_turns": output.num_turns}
    context.step(label)
    try:
        result = await manager.score(unscored_table(row, output, extra_info, tokenizer.pad_token_id))
    except RewardError as error:
        context.error(f"{label}: {error}")
        return
    last_line = (result.detail.strip().splitlines() or [""])[-1]
    if result.error is None:
        context.rewards.append(result)
    elif result.error == "bad_return":
        context.error(f"{label}: {last_line}")
    elif result.error == "timeout":
        context.warn(f"{label}: the scorer did not answer in time ({last_line})")
    else:
        context.warn(f"{label} raised {last_line}; if the run would raise it too, correct it")
