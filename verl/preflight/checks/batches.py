"""Batch sizes, ranks and lengths against each other."""

from __future__ import annotations

from collections.abc import Callable

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_ref
from verl.preflight.findings import Findings

_MINI = "actor_rollout_ref.actor.ppo_mini_batch_size"
_MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
_TP = "actor_rollout_ref.rollout.tensor_model_parallel_size"


def check_batches(config: PPOConfig, found: Findings) -> None:
    """Prompts, mini-batches, ranks and micro-batches have to divide; the nearest sizes that do are named."""
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    micro = None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
    check_division((_MINI, actor.ppo_mini_batch_size), (_MICRO, micro), config, found)
    if n == 1 and config.algorithm.adv_estimator in names.GROUP_ESTIMATORS:
        found.warnings.append(
            f"actor_rollout_ref.rollout.n=1 with algorithm.adv_estimator={config.algorithm.adv_estimator}: a sample is "
            "compared with the others of its prompt, and there are none; use n=4 or more"
        )
    _check_micro_batching(config, found)


def check_division(mini: tuple[str, int], micro: tuple[str, int | None], config: PPOConfig, found: Findings) -> None:
    """A step's prompts divide into mini-batches, these among the ranks, a rank's share into micro-batches.

    Args:
        mini: key and value in prompts.
        micro: key and value in samples, None where micro-batches are made otherwise.
    """
    prompts, n, ranks = config.data.train_batch_size, config.actor_rollout_ref.rollout.n, trainer_ranks(config)

    def fits(size: int) -> bool:
        return prompts % size == 0 and size * n % ranks == 0

    if not fits(mini[1]):
        found.errors.append(_mini_batch_error(prompts, mini, n, ranks, fits))
    elif micro[1] is not None:
        share, size = mini[1] * n // ranks, micro[1]
        if share % size:
            found.errors.append(
                f"{micro[0]}={size}: does not divide the {share} samples that a rank has of a mini-batch "
                f"({mini[0]}={mini[1]} prompts x rollout.n={n} / {ranks} ranks); "
                f"use {near(size, share, lambda size: share % size == 0)}"
            )


def _mini_batch_error(prompts: int, mini: tuple[str, int], n: int, ranks: int, fits: Callable[[int], bool]) -> str:
    key, size = mini
    if prompts % size:
        why = (
            f"is larger than data.train_batch_size={prompts} prompts"
            if size > prompts
            else f"does not divide data.train_batch_size={prompts} prompts"
        )
    else:
        why = f"x rollout.n={n} = {size * n} samples do not divide among {ranks} ranks"
    sizes = near(size, prompts, fits)
    if sizes:
        return f"{key}={size}: {why}; use {sizes}"
    rows = near(prompts, prompts + ranks, lambda size: size * n % ranks == 0)
    return (
        f"{key}={size}: {why}, and no other does; use data.train_batch_size={rows}, or another number of ranks "
        "(trainer.n_gpus_per_node, trainer.nnodes)"
    )


def _check_micro_batching(config: PPOConfig, found: Findings) -> None:
    roles = config.actor_rollout_ref
    actor, longest = roles.actor, config.data.max_prompt_length + config.data.max_response_length
    prefix = "actor_rollout_ref.actor."
    check_limits(
        (prefix + "use_dynamic_bsz", actor.use_dynamic_bsz),
        (_MICRO, actor.ppo_micro_batch_size_per_gpu),
        (prefix + "ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
        longest,
        found,
    )
    sections = {"rollout": roles.rollout} | ({"ref": roles.ref} if needs_ref(config) else {})
    for name, section in sections.items():
        values = (
            ("log_prob_use_dynamic_bsz", section.log_prob_use_dynamic_bsz, actor.use_dynamic_bsz),
            (
                "log_prob_micro_batch_size_per_gpu",
                section.log_prob_micro_batch_size_per_gpu,
                actor.ppo_micro_batch_size_per_gpu,
            ),
            ("log_prob_max_token_len_per_gpu", section.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
        )
        if all(own is None for _, own, _ in values):
            continue  # the actor's limits, judged above
        dynamic, size, tokens = (
            (f"actor_rollout_ref.{name}.{key}", inherited if own is None else own) for key, own, inherited in values
        )
        check_limits(dynamic, size, tokens, longest, found)


def check_limits(
    dynamic: tuple[str, bool | None],
    size: tuple[str, int | None],
    tokens: tuple[str, int | None],
    longest: int,
    found: Findings,
) -> None:
    """A section's three keys and their values: they limit micro-batches, to sizes that a sample fits into."""
    if not dynamic[1]:
        if size[1] is None:
            found.errors.append(f"{size[0]} is not set: give the samples a rank runs at once, or set {dynamic[0]}=True")
    elif tokens[1] is not None and tokens[1] < longest:
        found.errors.append(
            f"{tokens[0]}={tokens[1]}: a sample may have {longest} tokens (data.max_prompt_length + "
            f"data.max_response_length); use at least {longest}"
        )


def check_replicas(config: PPOConfig, found: Findings) -> None:
    """A node's devices have to divide into replicas: an engine is on one node."""
    rollout = config.actor_rollout_ref.rollout
    devices = rollout.n_gpus_per_node if rollout.nnodes else config.trainer.n_gpus_per_node
    size = rollout.tensor_model_parallel_size
    if devices % size:
        field = "actor_rollout_ref.rollout.n_gpus_per_node" if rollout.nnodes else "trainer.n_gpus_per_node"
        found.errors.append(
            f"{_TP}={size}: does not divide {field}={devices}; use {near(size, devices, lambda tp: devices % tp == 0)}"
        )


def trainer_ranks(config: PPOConfig) -> int:
    """Ranks of the trainer."""
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def rollout_devices(config: PPOConfig) -> int:
    """Devices (on a CPU, shares of it) that the replicas divide among them."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.n_gpus_per_node * rollout.nnodes or trainer_ranks(config)


def near(size: int, largest: int, fits: Callable[[int], bool]) -> str:
    """The nearest sizes below and above `size`, up to `largest`, that fit: "4", "4 or 8", or "" if none does."""
    below = next((number for number in range(min(size - 1, largest), 0, -1) if fits(number)), None)
    above = next((number for number in range(size + 1, largest + 1) if fits(number)), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
