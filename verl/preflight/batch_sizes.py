"""Checks of batch sizes that several roles share: division into mini-batches and micro-batches, and token limits."""

from __future__ import annotations

from collections.abc import Callable

from verl.config.actor import ActorConfig
from verl.config.ppo import PPOConfig
from verl.config.ref import RefConfig
from verl.config.rollout import RolloutConfig
from verl.config.sequence_parallel import actor_sequence_parallel
from verl.preflight.findings import Findings
from verl.preflight.placement import shard_count


def longest_sample(config: PPOConfig) -> int:
    """Return the maximum tokens of a sample."""
    return config.data.max_prompt_length + config.data.max_response_length


def nearest_sizes(size: int, largest: int, fits: Callable[[int], bool]) -> str:
    """Return the nearest fitting numbers below and above `size`, up to `largest`: "4", "4 or 8", or "" without any."""
    below = next((number for number in range(min(size - 1, largest), 0, -1) if fits(number)), None)
    above = next((number for number in range(size + 1, largest + 1) if fits(number)), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def check_division(
    mini: tuple[str, int], micro: tuple[str, int | None], ranks_per_sample: int, config: PPOConfig, found: Findings
) -> None:
    """Check that mini-batches divide a step, ranks divide mini-batches, and micro-batches divide a rank's share or hold
    all of it.

    Ranks that share samples count as one.

    Args:
        mini: key and value of the mini-batch size in prompts.
        micro: key and value of the micro-batch size in samples; None if micro-batches have a token budget.
        ranks_per_sample: ranks that share samples.
    """
    prompts, n = config.data.train_batch_size, config.actor_rollout_ref.rollout.n
    count = shard_count(config, ranks_per_sample)
    one, all_of = "rank", f"{count} ranks"
    if ranks_per_sample > 1:
        one = f"group of {ranks_per_sample} ranks"
        all_of = f"{count} groups of {ranks_per_sample} ranks, which share samples"

    # A fully asynchronous run derives the prompts of a step from the actor's mini-batches.
    derived = config.async_training.enable and mini[0].startswith("actor_rollout_ref.")

    def fits(size: int) -> bool:
        return (derived or prompts % size == 0) and size * n % count == 0

    if not fits(mini[1]):
        found.add_size_error(_mini_batch_error(prompts, mini, n, count, all_of, fits))
    elif micro[1] is not None:
        share, size = mini[1] * n // count, micro[1]
        # A larger micro-batch holds the whole share.
        if size < share and share % size:
            found.add_size_error(
                f"{micro[0]}={size}: must divide the {share} samples of a mini-batch on each {one} ({mini[0]}="
                f"{mini[1]} prompts x rollout.n={n} / {all_of}); "
                f"use {nearest_sizes(size, share, lambda number: share % number == 0)}"
            )


def _mini_batch_error(
    prompts: int, mini: tuple[str, int], n: int, count: int, all_of: str, fits: Callable[[int], bool]
) -> str:
    key, size = mini
    if size > prompts:
        problem = f"must be at most data.train_batch_size={prompts} prompts"
    elif prompts % size:
        problem = f"must divide data.train_batch_size={prompts} prompts"
    else:
        problem = f"with rollout.n={n} these are {size * n} samples, which do not divide evenly among {all_of}"
    sizes = nearest_sizes(size, prompts, fits)
    if sizes:
        return f"{key}={size}: {problem}; use {sizes}"
    rows = nearest_sizes(prompts, prompts + count, lambda number: number * n % count == 0)
    return (
        f"{key}={size}: {problem}, and no other value fits; use data.train_batch_size={rows}, or change the number of "
        "ranks (trainer.n_gpus_per_node, trainer.nnodes)"
    )


def check_micro_batch_limit(
    dynamic: tuple[str, bool | None],
    samples: tuple[str, int | None],
    tokens: tuple[str, int | None],
    longest: int,
    sequence_parallel: int,
    found: Findings,
) -> None:
    """Check that a section limits its micro-batches, and that the limit admits the longest sample.

    Args:
        dynamic: key and value that choose between the two limits.
        samples: key and value of the limit in samples.
        tokens: key and value of the limit in tokens.
        longest: tokens of the longest sample.
        sequence_parallel: ranks that share a sample, each of which has this limit in tokens.
    """
    if not dynamic[1]:
        if samples[1] is None:
            found.add_size_error(
                f"{samples[0]} is not set: set it to the number of samples that a rank runs at once, or set "
                f"{dynamic[0]}=True"
            )
    elif tokens[1] is not None and tokens[1] * sequence_parallel < longest:
        shared = f", which {sequence_parallel} ranks share" if sequence_parallel > 1 else ""
        found.errors.append(
            f"{tokens[0]}={tokens[1]}: a sample can have {longest} tokens (data.max_prompt_length + "
            f"data.max_response_length{shared}); use at least {-(-longest // sequence_parallel)}"
        )


def check_log_prob_limit(
    name: str,
    section: RolloutConfig | RefConfig,
    actor: ActorConfig,
    longest: int,
    sequence_parallel: int,
    found: Findings,
) -> None:
    """Check the limits of log-probability micro-batches; null values take the actor's value.

    Args:
        name: `rollout` or `ref`, below `actor_rollout_ref`.
        longest, sequence_parallel: as for `check_micro_batch_limit`.
    """
    dynamic, samples, tokens = (
        section.log_prob_use_dynamic_bsz,
        section.log_prob_micro_batch_size_per_gpu,
        section.log_prob_max_token_len_per_gpu,
    )
    if dynamic is samples is tokens is None and sequence_parallel == actor_sequence_parallel(actor):
        return  # equal to the actor's limits, which have their own check
    prefix = f"actor_rollout_ref.{name}.log_prob_"
    check_micro_batch_limit(
        (prefix + "use_dynamic_bsz", actor.use_dynamic_bsz if dynamic is None else dynamic),
        (prefix + "micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu if samples is None else samples),
        (prefix + "max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu if tokens is None else tokens),
        longest,
        sequence_parallel,
        found,
    )
