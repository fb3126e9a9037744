"""Probe of the advantage estimator and the policy loss: a step on a small made-up batch, on the CPU.

The batch is built by the code that builds the batch of a run, with the run's number of samples per prompt. One prompt
has different scores, one the score 1 for every sample, one the score 0.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.algorithms.kl_in_reward import get_kl_controller
from verl.algorithms.losses import get_policy_loss_fn, get_token_selector
from verl.config.roles import needs_critic, needs_ref
from verl.config.rollout_correction import Correction, resolve
from verl.protocol import DataProto
from verl.trainer.ppo.batching import split_mini_batches
from verl.trainer.ppo.estimator_columns import estimator_columns
from verl.trainer.ppo.off_policy import correct_rollout, drop_rejected
from verl.trainer.ppo.rewards_to_advantages import batch_advantages
from verl.trainer.probes.context import Context, summary
from verl.trainer.probes.kinds import own_estimator, own_loss
from verl.workers.engine.metric_sums import MeanShare
from verl.workers.policy_objective import PolicyObjective, select_tokens
from verl.workers.reward.loop import RewardResult

_PROMPT_TOKENS, _RESPONSE_TOKENS, _VOCABULARY = 3, 6, 16
_SCORES = (None, 1.0, 0.0)
"""Score of all samples of each prompt; None: they alternate between 0 and 1."""


def probe(context: Context) -> None:
    """Compute advantages, and with an own policy loss its value and gradient."""
    config = context.config
    correction = resolve(config.algorithm.rollout_correction)
    name = config.algorithm.adv_estimator
    label = f"algorithm.adv_estimator={name}"
    context.step(label)
    try:
        batch = _add_passes(context, _rollout(context), estimator_columns(config, correction), correction)
        if own_estimator(config):
            controller = get_kl_controller(**dataclasses.asdict(config.algorithm.kl_ctrl))
            batch, _ = batch_advantages(batch, config.algorithm, correction, controller)
        elif "rollout_log_probs" in batch.batch and not correction.bypass_mode:
            batch = drop_rejected(correct_rollout(batch, correction)[0])
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        _report(context, label, error, on_cpu=True)
        return
    if not own_loss(config) or correction.bypass_mode:
        return
    label = f"actor_rollout_ref.actor.policy_loss.loss_mode={config.actor_rollout_ref.actor.policy_loss.loss_mode}"
    context.step(label)
    try:
        _probe_loss(context, batch, label)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        _report(context, label, error, on_cpu=context.job.device == "cpu")


def _report(context: Context, label: str, error: BaseException, *, on_cpu: bool) -> None:
    """Report an exception.

    Args:
        on_cpu: the run calls the function on the CPU, so torch's errors about shapes and devices are those of the run.
    """
    if isinstance(error, ValueError) and str(error).startswith(label):
        context.error(str(error))
    elif isinstance(error, KeyError | ValueError) and not _knows_columns(context):
        context.warn(f"{label} raised {summary(error)}; values of rewards and agent loops are not known before the run")
    elif isinstance(error, RuntimeError | AssertionError):
        context.raised(label, error, certain=on_cpu)
    else:
        context.raised(label, error)


def _knows_columns(context: Context) -> bool:
    """Return True if the made-up batch has all columns of the run's batches."""
    default = context.config.actor_rollout_ref.rollout.agent.default_agent_loop
    loops = {default, *(sample.row.get("agent_name") for sample in context.samples)}
    return bool(context.rewards) and loops <= {"single_turn_agent", None}


def _rollout(context: Context) -> DataProto:
    """Return the batch of a generation: see `to_batch`."""
    generator = torch.Generator().manual_seed(0)
    rollout = context.config.actor_rollout_ref.rollout
    empty = {"data_source": "unknown", "reward_model": {}, "extra_info": {}, "raw_prompt": []}
    row = context.samples[0].row if context.samples else empty
    extra = context.rewards[0].extra if context.rewards else {}
    samples = []
    for prompt, shared_score in enumerate(_SCORES):
        for i in range(rollout.n):
            # All lengths from 1 to the longest.
            length = 1 + (prompt + i) % _RESPONSE_TOKENS
            tokens = torch.randint(_VOCABULARY, (_PROMPT_TOKENS + length,), generator=generator).tolist()
            output = AgentLoopOutput(
                prompt_ids=tokens[:_PROMPT_TOKENS],
                response_ids=tokens[_PROMPT_TOKENS:],
                response_mask=[1] * length,
                response_logprobs=(-torch.rand(length, generator=generator)).tolist(),
                weight_versions=[0] * length,
            )
            score = float(i % 2) if shared_score is None else shared_score
            samples.append(ScoredSample({**row, "uid": f"1.{prompt}"}, output, RewardResult(score, extra, None, 0.0)))
    return to_batch(samples, pad_token_id=0, with_log_probs=rollout.calculate_log_probs)


def _add_passes(context: Context, batch: DataProto, estimator: tuple[str, ...], correction: Correction) -> DataProto:
    """Add the columns of the forward passes of the run, float32, 0 outside the response."""
    mask = batch.batch["response_mask"]
    generator = torch.Generator().manual_seed(1)

    def column() -> torch.Tensor:
        return torch.rand(mask.shape, generator=generator) * mask

    # The engine's and the trainer's log-probabilities differ by rounding.
    names = {"old_log_probs"} if not correction.bypass_mode else set()
    names |= {name for name in ("entropys", "sum_pi_squared") if name in estimator}
    names |= {"ref_log_prob"} if needs_ref(context.config) else set()
    names |= {"values"} if needs_critic(context.config) else set()
    log_probs = batch.batch.get("rollout_log_probs", -column())
    tensors = {
        name: log_probs + 1e-3 * column() if name.endswith(("log_probs", "log_prob")) else column()
        for name in sorted(names)
    }
    if "reward_baselines" in estimator:
        tensors["reward_baselines"] = torch.rand(len(batch), generator=generator)
    if not own_estimator(context.config):
        tensors["advantages"] = column() - 0.5 * mask
    return batch.union(DataProto.from_dict(tensors=tensors))


def _probe_loss(context: Context, batch: DataProto, label: str) -> None:
    """Compute the loss and its gradient for a mini-batch; with several ranks also for a micro-batch without tokens.

    Raises:
        ValueError: the loss or its gradient is not finite, or see `PolicyObjective`.
    """
    config = context.config.actor_rollout_ref
    loss_mode = config.actor.policy_loss.loss_mode
    ((shard,),) = split_mini_batches(
        batch,
        len(batch),
        1,
        loss_scale_factor=config.actor.loss_scale_factor or context.config.data.max_response_length,
    )
    columns: dict[str, torch.Tensor] = {str(name): shard.batch[name] for name in shard.batch.keys()}  # noqa: SIM118
    mask = columns["response_mask"].bool()
    log_probs = columns["old_log_probs"] + 0.01 * mask
    selector = get_token_selector(loss_mode)
    if selector is not None:
        tokens = {name: columns[name][mask] for name in ("old_log_probs", "advantages")}
        selected = select_tokens(
            selector,
            log_prob=log_probs[mask],
            old_log_prob=tokens["old_log_probs"],
            advantages=tokens["advantages"],
            config=config.actor,
            seed=0,
        )
        columns["selected_tokens"] = torch.zeros(mask.shape, dtype=torch.int64)
        columns["selected_tokens"][mask] = selected.to(torch.int64)
    # Without the other terms, so that the gradient is that of the policy loss.
    actor = copy.copy(config.actor)
    actor.use_kl_loss, actor.entropy_coeff = False, 0.0
    objective = PolicyObjective(get_policy_loss_fn(loss_mode), actor, shard.meta_info)
    gradient = _backward(objective, log_probs, columns, f"{label} returned")
    if not bool(gradient.any()) and bool(columns["advantages"].any()):
        context.warn(
            f"{label} returned a loss whose gradient is 0 for every token; compute it from log_prob, without .item(), "
            ".detach() or torch.no_grad()"
        )
    trainer = context.config.trainer
    if trainer.n_gpus_per_node * trainer.nnodes == 1:
        return
    empty = {name: column[:1] * 0 for name, column in columns.items()}
    try:
        _backward(objective, log_probs[:1] * 0, empty, f"{label} returned")
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        context.warn(
            f"{label}: a rank with fewer micro-batches than others calls the loss without a token, which fails: "
            f"{summary(error)}; return a finite loss there, as agg_loss does"
        )


def _backward(objective: Any, log_probs: torch.Tensor, columns: dict[str, torch.Tensor], returned: str) -> torch.Tensor:
    """Return the gradient of the loss; ValueError if the loss, the gradient or a metric is not finite."""
    log_probs = log_probs.detach().requires_grad_()
    loss, metrics = objective(log_probs, torch.zeros_like(log_probs), columns)
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"{returned} the loss {loss.item()}; a loss must be finite")
    loss.backward()
    if log_probs.grad is None or not bool(torch.isfinite(log_probs.grad).all()):
        raise ValueError(f"{returned} a loss whose gradient is NaN or infinite; check roots, logarithms and divisions")
    for name, metric in metrics.items():
        value = metric.value if isinstance(metric, MeanShare) else metric
        if not bool(torch.isfinite(value)):
            raise ValueError(f"{returned} the metric {name}={value.item()}; a metric must be finite")
    return log_probs.grad
