"""Checks of `skip.rollout`: features whose result a cached rollout would make wrong."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.config.stream import carries_prompts
from verl.preflight.findings import Findings

_ON = "skip.rollout.enable=True"
_ROLLOUT = "actor_rollout_ref.rollout"


def check_skip(config: PPOConfig, found: Findings) -> None:
    """Check that a step can train on the cached samples of another run."""
    skip, rollout = config.skip.rollout, config.actor_rollout_ref.rollout
    if not skip.enable:
        return
    if not skip.steps:
        found.warnings.append(
            "skip.rollout.steps=[]: no rollout is kept or read; list the training steps, for example [1,2]"
        )
    if carries_prompts(config):
        key = "async_training.enable" if config.async_training.enable else f"{_ROLLOUT}.partial_rollout"
        found.errors.append(
            f"{_ON} with {key}=True: prompts continue after their step, so that a step has no rollout of its own; "
            "remove one of the two"
        )
    if rollout.replay_sampling_mask:
        found.errors.append(
            f"{_ON} with {_ROLLOUT}.replay_sampling_mask=True: sampling masks are not kept; remove one of the two"
        )
    if rollout.quantization_guard.max_k3_kl is not None:
        found.errors.append(
            f"{_ON} with {_ROLLOUT}.quantization_guard.max_k3_kl={rollout.quantization_guard.max_k3_kl}: cached "
            "samples come from the weights of another run, which the guard would take for errors of the "
            "quantization; remove one of the two"
        )
    if skip.action == "repeat":
        _check_repeat(config, found)


def _check_repeat(config: PPOConfig, found: Findings) -> None:
    """Check that nothing needs the samples to belong to the prompts of the step."""
    groups, sampler = config.algorithm.filter_groups, config.data.sampler
    others = {
        "algorithm.filter_groups.enable=True": groups.enable,
        f"data.sampler.class_path={show(sampler.class_path)}": sampler.class_path is not None,
    }
    for other, given in others.items():
        if given:
            found.errors.append(
                f"skip.rollout.action=repeat with {other}: it chooses prompts by the samples of the step, which are "
                "those of other prompts; use skip.rollout.action=cache"
            )
