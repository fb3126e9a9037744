"""What the actor minimises: policy loss, entropy bonus and KL loss of one micro-batch."""

from __future__ import annotations

from typing import Any

import torch

from verl.trainer.ppo.core_algos import agg_loss, kl_penalty


class PolicyObjective:
    """Policy loss - entropy bonus + KL loss, of one micro-batch, as parts of the mini-batch's.

    Args:
        policy_loss: an entry of the policy-loss registry.
        actor: the `actor` section.
        meta_info: of the mini-batch: `global_tokens`, `global_sequences`, `loss_scale_factor`.
    """

    def __init__(self, policy_loss: Any, actor: Any, meta_info: dict[str, Any]):
        self._policy_loss = policy_loss
        self._actor = actor
        names = ("global_tokens", "global_sequences", "loss_scale_factor")
        self._denominators = {name: meta_info[name] for name in names}
        self._loss_config = _WithBatchInfo(actor, self._denominators)

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        actor, mask, mode = self._actor, columns["response_mask"], self._actor.loss_agg_mode
        loss, metrics = self._policy_loss(
            old_log_prob=columns["old_log_probs"],
            log_prob=log_probs,
            advantages=columns["advantages"],
            response_mask=mask,
            loss_agg_mode=mode,
            config=self._loss_config,
            rollout_is_weights=columns.get("rollout_is_weights"),
        )
        metrics = {"actor/pg_loss": loss.detach(), **metrics}
        metrics["actor/entropy"] = agg_loss(entropy.detach(), mask, "token-mean", **self._denominators)
        if actor.entropy_coeff != 0:
            loss = loss - actor.entropy_coeff * agg_loss(entropy, mask, mode, **self._denominators)
        if actor.use_kl_loss:
            kl = kl_penalty(log_probs, columns["ref_log_prob"], actor.kl_loss_type)
            kl_loss = agg_loss(kl, mask, mode, **self._denominators)
            loss = loss + actor.kl_loss_coef * kl_loss
            metrics["actor/kl_loss"] = kl_loss.detach()
        return loss, metrics


class _WithBatchInfo:
    """The actor section with `global_batch_info`, the mini-batch's denominators, for the policy loss to read."""

    def __init__(self, actor: Any, global_batch_info: dict[str, Any]):
        self._actor = actor
        self.global_batch_info = global_batch_info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)
