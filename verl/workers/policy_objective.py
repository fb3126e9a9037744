"""The objective that the actor minimizes: policy loss, entropy bonus and KL loss of one micro-batch."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch

from verl.algorithms.losses import agg_loss, get_token_selector, kl_penalty
from verl.algorithms.losses.common import LossConfig
from verl.config import ActorConfig
from verl.config.rollout_correction import Correction
from verl.workers.engine.metric_sums import MeanShare
from verl.workers.update_loop import loss_denominators

_OWN_METRICS = frozenset(
    (
        *(
            f"actor/{name}"
            for name in ("pg_loss", "entropy", "entropy_loss", "kl_loss", "kl_coef", "loss", "grad_norm", "lr")
        ),
        *("loss", "tokens", "positions", "padding_fraction"),  # of the engine
    )
)


def select_tokens(
    selector: Callable[..., Any],
    *,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    config: ActorConfig,
    seed: int,
) -> torch.Tensor:
    """Return the tokens that a policy loss selects from a mini-batch, [N], not 0 for a selected token.

    Args:
        selector: the `select_tokens` of the loss, see `register_policy_loss`.
        log_prob, old_log_prob, advantages: [N], of all response tokens of the mini-batch.
        config: the `actor` section.
        seed: for a random choice.

    Raises:
        ValueError: the selector returned another type or shape.
    """
    rows = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    selected = selector(
        **{name: values.unsqueeze(0) for name, values in rows.items()},
        response_mask=torch.ones(1, len(log_prob)),
        config=config,
        seed=seed,
    )
    expected = [1, len(log_prob)]
    if not isinstance(selected, torch.Tensor) or list(selected.shape) != expected:
        given = list(selected.shape) if isinstance(selected, torch.Tensor) else type(selected).__name__
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={config.policy_loss.loss_mode}: select_tokens returned "
            f"{given}; return a bool tensor [B, T], here {expected}"
        )
    return selected.squeeze(0)


class PolicyObjective:
    """Policy loss - entropy bonus + KL loss of one micro-batch, divided by the denominators of its mini-batch.

    Args:
        policy_loss: an entry of the policy-loss registry.
        actor: the `actor` section.
        meta_info: meta_info of the mini-batch: `batch_num_tokens`, `global_batch_size`, `loss_scale_factor`.
        rollout_correction: correction that the policy loss applies itself and reads as `config.rollout_correction`;
            None for a policy loss without one.

    Attributes:
        training_log_probs: with `rollout_correction`, the `sample_index` [b] and log-probabilities [b, T] of each
            micro-batch so far.
    """

    def __init__(
        self,
        policy_loss: Callable[..., Any],
        actor: ActorConfig,
        meta_info: dict[str, Any],
        rollout_correction: Correction | None = None,
    ):
        self._policy_loss = policy_loss
        self._extra_columns = ("selected_tokens",) if get_token_selector(policy_loss) is not None else ()
        self._actor = actor
        self._denominators = loss_denominators(meta_info)
        self._keeps_log_probs = rollout_correction is not None
        self.training_log_probs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._loss_config = LossConfig.extend(actor, self._denominators, rollout_correction)

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | MeanShare]]:
        """Return the loss and the metrics `actor/*` without gradient, as described in `LossFn`."""
        actor, mask, mode = self._actor, columns["response_mask"], self._actor.loss_agg_mode
        if self._keeps_log_probs and bool(mask.any()):  # a micro-batch without samples has no index in the batch
            self.training_log_probs.append((columns["sample_index"], log_probs.detach()))
        returned = self._policy_loss(
            old_log_prob=columns["old_log_probs"],
            log_prob=log_probs,
            advantages=columns["advantages"],
            response_mask=mask,
            loss_agg_mode=mode,
            config=self._loss_config,
            rollout_is_weights=columns.get("rollout_is_weights"),
            **{name: columns[name] for name in self._extra_columns},
        )
        loss, metrics = self._checked(returned)
        metrics = {"actor/pg_loss": loss.detach(), **self._shares(metrics, mask)}
        # The backward pass is collective, and a user's loss may be a constant, e.g. for a micro-batch without samples.
        loss = loss + log_probs[:0].sum()
        metrics["actor/entropy"] = agg_loss(entropy.detach(), mask, "token-mean", **self._denominators)
        entropy_loss = agg_loss(entropy, mask, mode, **self._denominators)
        metrics["actor/entropy_loss"] = entropy_loss.detach()
        if actor.entropy_coeff != 0:
            loss = loss - actor.entropy_coeff * entropy_loss
        if actor.use_kl_loss:
            kl = kl_penalty(log_probs, columns["ref_log_prob"], actor.kl_loss_type)
            kl_loss = agg_loss(kl, mask, mode, **self._denominators)
            loss = loss + actor.kl_loss_coef * kl_loss
            metrics["actor/kl_loss"] = kl_loss.detach()
        return loss, metrics

    def _checked(self, returned: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Return the result of the policy loss; ValueError if it is not a scalar and a dict."""
        name = f"actor_rollout_ref.actor.policy_loss.loss_mode={self._actor.policy_loss.loss_mode}"
        if not isinstance(returned, tuple | list) or len(returned) != 2 or not isinstance(returned[1], Mapping):
            given = f"{len(returned)} values" if isinstance(returned, tuple | list) else type(returned).__name__
            raise ValueError(
                f"{name} returned {given}; return a tuple (loss, metrics) of a scalar tensor and a dict of metrics"
            )
        loss, metrics = returned
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            kind = str(list(loss.shape)) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"{name} returned the loss as {kind}; return a scalar tensor, for example the result of agg_loss"
            )
        return loss.reshape(()), metrics

    def _shares(self, metrics: Mapping[str, Any], mask: torch.Tensor) -> dict[str, torch.Tensor | MeanShare]:
        """Turn the metrics of a policy loss into values that are summed over micro-batches and ranks.

        A tensor is such a value already. A number is a mean over the micro-batch. Weighted by the micro-batch's share
        of the tokens of the mini-batch, the sum is the mean over the tokens of all micro-batches that have the metric.
        """
        tokens = mask.sum()
        share = tokens / max(self._denominators["batch_num_tokens"], 1.0)
        shares: dict[str, torch.Tensor | MeanShare] = {}
        loss_mode = f"actor_rollout_ref.actor.policy_loss.loss_mode={self._actor.policy_loss.loss_mode}"
        if taken := sorted(_OWN_METRICS & metrics.keys()):
            raise ValueError(f"{loss_mode} returned the metrics {taken}, which the actor computes; choose other names")
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                shares[name] = value.detach().reshape(())
            elif isinstance(value, numbers.Real):
                # Not multiplied without a token: the mean of no tokens may be NaN.
                shares[name] = MeanShare(torch.where(tokens > 0, share * float(value), 0.0), share)
            else:
                raise ValueError(
                    f"{loss_mode} returned the metric {name} as {type(value).__name__} {str(value)[:80]}; return a "
                    "number or a tensor with one element"
                )
        return shares
