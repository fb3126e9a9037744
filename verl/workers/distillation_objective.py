"""The objective of on-policy distillation: a loss that pulls the policy to its teacher, alone or with task rewards."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses import agg_loss, get_policy_loss_fn, kl_penalty
from verl.algorithms.losses.common import LossConfig
from verl.config import ActorConfig
from verl.config.distillation import DistillationLossConfig
from verl.workers.engine.metric_sums import MeanShare
from verl.workers.policy_objective import PolicyObjective
from verl.workers.update_loop import loss_denominators


class DistillationObjective:
    """The distillation loss of one micro-batch, alone or added to the policy's objective.

    Per token, d = KL estimate(log_prob, teacher_log_probs), clamped to +-loss_max_clamp. With `use_policy_gradient`, -d
    is the advantage of PPO's clipped loss (https://thinkingmachines.ai/blog/on-policy-distillation); otherwise the
    aggregated d is the loss (arXiv:2306.13649).

    Args:
        policy: the objective of the `actor` section, which gives the metrics `actor/*` even if it is not trained on.
        settings: the section `distillation.distillation_loss`.
        actor: the `actor` section.
        meta_info: as in `PolicyObjective`.
    """

    def __init__(
        self, policy: PolicyObjective, settings: DistillationLossConfig, actor: ActorConfig, meta_info: dict[str, Any]
    ):
        self._policy, self._settings, self._actor = policy, settings, actor
        self._denominators = loss_denominators(meta_info)
        self._policy_loss = get_policy_loss_fn(settings.policy_loss_mode)
        self._loss_config = LossConfig.extend(actor, self._denominators, None)
        self._loss_config.clip_ratio_low = settings.clip_ratio_low
        self._loss_config.clip_ratio_high = settings.clip_ratio_high

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | MeanShare]]:
        """Return the loss and the metrics `actor/*` and `distillation/*`; arguments as in `LossFn`."""
        policy_loss, metrics = self._policy(log_probs, entropy, columns)
        loss, own = self._distillation_loss(log_probs, columns)
        metrics |= {"distillation/loss": loss.detach(), **own}
        if self._settings.use_task_rewards:
            loss = policy_loss + self._settings.distillation_loss_coef * loss
        return loss, metrics

    def _distillation_loss(
        self, log_probs: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings, mask, mode = self._settings, columns["response_mask"], self._actor.loss_agg_mode
        estimates = kl_penalty(log_probs, columns["teacher_log_probs"], settings.loss_mode)
        metrics = {
            "distillation/abs_loss": agg_loss(estimates.detach().abs(), mask, "token-mean", **self._denominators)
        }
        if settings.loss_max_clamp is not None:
            estimates = estimates.clamp(-settings.loss_max_clamp, settings.loss_max_clamp)
        if not settings.use_policy_gradient:
            return agg_loss(estimates, mask, mode, **self._denominators), metrics
        loss, found = self._policy_loss(
            old_log_prob=columns["old_log_probs"],
            log_prob=log_probs,
            advantages=-estimates.detach(),
            response_mask=mask,
            loss_agg_mode=mode,
            config=self._loss_config,
            rollout_is_weights=columns.get("rollout_is_weights"),
        )
        return loss, metrics | {name.replace("actor/", "distillation/"): value for name, value in found.items()}
