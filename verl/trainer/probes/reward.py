"""Probe of the reward function: called with a row of the training data and one of the validation data.

The response is the text of the ground truth, the best response that is known.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable
from typing import Any

from verl.config.reward_kwargs import scorer_kwargs
from verl.trainer.probes.context import Context, Sample, place
from verl.workers.reward.function import (
    MODEL_ARGUMENTS,
    PATH_KEY,
    BadReturnError,
    NonFiniteScoreError,
    RewardFunctionError,
    ScoreFunction,
    load_function,
    read_return,
)
from verl.workers.reward.loop import RewardResult
from verl.workers.reward.managers import ComponentError, make_manager

# Metrics of dynamic sampling that are not values of the reward function; see verl/trainer/rollouts/dynamic_sampling.py.
_SCORES = ("seq_reward", "seq_final_reward", "score")

# Values that agent loops add to extra_info; see verl/agent_loop/tool_agent_loop.py.
TOOL_FIELDS = {
    "tool_rewards": [],
    "rollout_reward_scores": {},
    "tool_call_counts": 0,
    "tool_failures": {},
    "tool_seconds": 0.0,
}


class MissingKeyError(KeyError):
    """A reward function read a key that the row does not have.

    Attributes:
        where: the argument that lacks the key.
        known: the keys that it has.
    """

    def __init__(self, key: Any, where: str, known: list[str]):
        super().__init__(key)
        self.where, self.known = where, known


class RowDict(dict[Any, Any]):
    """A dict of a row whose missing keys raise `MissingKeyError`, so that they differ from those of other dicts."""

    def __init__(self, values: dict[Any, Any], where: str):
        super().__init__({name: tracked(value, f"{where}[{name!r}]") for name, value in values.items()})
        self.where = where

    def __missing__(self, key: Any) -> Any:
        raise MissingKeyError(key, self.where, [str(name) for name in self])


def tracked(value: Any, where: str) -> Any:
    """Return a copy of a value of a row, with a `RowDict` for each dict."""
    if isinstance(value, dict):
        return RowDict(value, where)
    return [tracked(item, f"{where}[{i}]") for i, item in enumerate(value)] if isinstance(value, list) else value


def probe(context: Context) -> None:
    """Load the function, call it for each sample and read its return value."""
    function, label = load(context)
    if function is None or not_callable(context, label):
        return
    if not context.samples:
        context.note(f"{label}: not called, because no row of the data could be read")
    for sample in context.samples:
        _call(context, function, sample, label)


def load(context: Context) -> tuple[ScoreFunction | None, str]:
    """Return the function, None after an error, and its name for messages."""
    section = context.config.reward
    custom = section.custom_reward_function
    label = f"{PATH_KEY}={custom.path}: {custom.name}"
    context.step(f"{label}: the import")
    try:
        # The values are those of the run, so only the names are checked here.
        model_kwargs = dict.fromkeys(MODEL_ARGUMENTS) if section.reward_model.enable else {}
        return load_function(custom.path, custom.name, scorer_kwargs(section), model_kwargs), label
    except RewardFunctionError as error:
        context.failed(error)
        return None, label


def not_callable(context: Context, label: str) -> bool:
    """Return True, with a note, if the function cannot be called before the run: it may ask the reward model."""
    if context.config.reward.reward_model.enable:
        context.note(f"{label}: not called, because the reward model is only served in a run")
        return True
    return False


def sample_response(row: dict[str, Any]) -> str:
    """Return the text of the ground truth, as the response of the sample."""
    truth = row["reward_model"].get("ground_truth")
    return "" if truth is None else str(truth)


def _call(context: Context, function: ScoreFunction, sample: Sample, label: str) -> None:
    row, label = sample.row, f"{label} with {sample.name}"
    loop = row.get("agent_name") or context.config.actor_rollout_ref.rollout.agent.default_agent_loop
    context.step(label)
    started = time.monotonic()
    try:
        value = function.call(
            data_source=row["data_source"],
            solution_str=sample_response(row),
            ground_truth=tracked(row["reward_model"].get("ground_truth"), "ground_truth"),
            extra_info=RowDict(_extra_info(row, loop), "extra_info"),
        )
        if inspect.isawaitable(value):
            value = asyncio.run(_finish(value))
        score, extra, note = read_return(value)
    except NonFiniteScoreError as error:
        context.warn(f"{label}: {error}; a sample without a finite score gets 0.0")
    except BadReturnError as error:
        context.error(f"{label}: {error}")
    except MissingKeyError as error:
        _missing_key(context, error, loop, label)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        context.raised(label, error, certain=False)
    else:
        seconds = time.monotonic() - started
        limit = context.config.reward.time_limit
        if seconds > limit:
            context.warn(f"{label} took {seconds:.0f} s, and reward.timeout={limit:g}; such a sample gets 0.0")
        if note:
            context.warn(f"{label}: {note}")
        _check_values(context, RewardResult(score, extra, None, seconds), label)


async def _finish(value: Awaitable[Any]) -> Any:
    return await value


def _extra_info(row: dict[str, Any], loop: str) -> dict[str, Any]:
    """Return `extra_info` with the values that the agent loop adds, as far as they are known."""
    fields = TOOL_FIELDS if loop == "tool_agent" else {}
    return {**(row.get("extra_info") or {}), **fields, "num_turns": 2}


def _missing_key(context: Context, error: MissingKeyError, loop: str, label: str) -> None:
    known = ", ".join(error.known) or "no key"
    text = f"{label} reads {error.where}[{error.args[0]!r}], which the row does not have{place(error)}; it has {known}"
    # The user's agent loops and tools may add values to extra_info.
    if error.where == "extra_info" and loop != "single_turn_agent":
        context.warn(f"{text}. Add it to the data, or check that the agent loop returns it")
    else:
        context.error(f"{text}. Add it to the data, or correct the function")


def _check_values(context: Context, result: RewardResult, label: str) -> None:
    """Check the values beside the score that other parts of the run need."""
    algorithm = context.config.algorithm
    try:
        manager = make_manager(context.config.reward, algorithm.gdpo_reward_keys or ())
        manager.reward(result.score, result.extra, response_length=1)
    except ComponentError as error:
        context.error(f"{label}: {error}")
        return
    groups = algorithm.filter_groups
    if groups.enable and groups.metric not in (*_SCORES, "num_turns", *result.extra):
        given = ", ".join([*_SCORES, *result.extra])
        text = f"algorithm.filter_groups.metric={groups.metric}: {label} returns no such value; use one of {given}"
        # Other agent loops add columns.
        single = context.config.actor_rollout_ref.rollout.agent.default_agent_loop == "single_turn_agent"
        (context.error if single else context.warn)(text)
    context.rewards.append(result)
