"""`old_log_probs` from the rollout, in steps in which a sample of the trainer's own values confirms them.

    samples of a step --+-- tokens from older weights ---> trainer
                        +-- chosen at random ------------> trainer: mean |difference| and KL within their limits?
                        +-- all others -----------------------> yes: rollout           no: trainer

Keys: `actor_rollout_ref.actor.old_log_probs_from_rollout`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import numpy as np
import torch

from verl.config.old_log_probs import PREFIX, OldLogProbsConfig
from verl.protocol import DataProto

logger = logging.getLogger(__name__)

RECOMPUTED = "recomputed_samples"
"""Column [B] bool: samples whose `old_log_probs` the trainer computed."""


class RolloutLogProbs:
    """Takes `old_log_probs` from the rollout if the check of the step allows it.

    Args:
        config: the limits of the check.
        seed: seed of the choice of the samples.
        ranks: number of trainer ranks, each of which gets at least one sample of a forward pass.
    """

    def __init__(self, config: OldLogProbsConfig, *, seed: int, ranks: int):
        self._config, self._seed, self._ranks = config, seed, ranks
        self._reused: bool | None = None

    async def add_old_log_probs(
        self, batch: DataProto, step: int, forward: Callable[[DataProto], Awaitable[DataProto]]
    ) -> tuple[DataProto, dict[str, float]]:
        """Add `old_log_probs` [B, T] float32, 0 where response_mask is 0, and `recomputed_samples` [B] bool.

        Args:
            batch: `rollout_log_probs` [B, T] float32, `response_mask` and `weight_versions` [B, T] int64, and the
                columns of a forward pass.
            step: the training step; its weights have the version `step - 1`.
            forward: computes `old_log_probs` [b, T] of some samples.

        Returns:
            The batch, and metrics: `rollout_corr/reused_fraction`, the share of the tokens whose value is the
            rollout's; `rollout_corr/checked_difference` and `rollout_corr/checked_k3_kl`, the mean |d| and mean
            exp(d) - 1 - d of the checked tokens, with d = log pi - log mu. Without a check the last two are missing.
        """
        columns = batch.batch
        mask = columns["response_mask"].bool()
        old = columns["rollout_log_probs"].masked_fill(~mask, 0.0)
        # A value that is not finite could be outside of the checked samples.
        usable = (~mask | ((columns["weight_versions"] == step - 1) & old.isfinite())).all(-1)
        checked = self._choose(usable & mask.any(-1), step)
        recomputed = ~usable
        recomputed[checked] = True
        if not len(checked) or len(batch) - int(recomputed.sum()) < self._ranks:
            old, recomputed = (await forward(batch)).batch["old_log_probs"], torch.ones_like(recomputed)
            self._note(step, reused=False, why="too few samples come from the current weights alone")
            return _with_columns(batch, old, recomputed), {"rollout_corr/reused_fraction": 0.0}
        rollout = old[checked][mask[checked]].double()
        old[recomputed] = (await forward(_rows(batch, recomputed))).batch["old_log_probs"]
        d = old[checked][mask[checked]].double() - rollout
        difference, k3_kl = d.abs().mean().item(), (d.expm1() - d).mean().item()
        metrics = {"rollout_corr/checked_difference": difference, "rollout_corr/checked_k3_kl": k3_kl}
        reused = difference <= self._config.max_difference and k3_kl <= self._config.max_k3_kl
        self._note(step, reused=reused, why=self._result(difference, k3_kl))
        if not reused:
            old[~recomputed] = (await forward(_rows(batch, ~recomputed))).batch["old_log_probs"]
            recomputed = torch.ones_like(recomputed)
        metrics["rollout_corr/reused_fraction"] = (mask[~recomputed].sum() / mask.sum().clamp(min=1)).item()
        return _with_columns(batch, old, recomputed), metrics

    def _choose(self, candidates: torch.Tensor, step: int) -> torch.Tensor:
        """Return the row numbers of the samples to check, ascending; `candidates` is [B] bool."""
        rows = candidates.nonzero().flatten().numpy()
        wanted = max(self._config.min_samples, self._ranks, math.ceil(self._config.sample_fraction * len(rows)))
        generator = np.random.default_rng((self._seed, step))
        return torch.from_numpy(np.sort(generator.choice(rows, size=min(wanted, len(rows)), replace=False)))

    def _result(self, difference: float, k3_kl: float) -> str:
        return (
            f"checked samples have a mean |difference| of {difference:.2g} ({PREFIX}max_difference="
            f"{self._config.max_difference:g}) and a KL divergence of {k3_kl:.2g} "
            f"({PREFIX}max_k3_kl={self._config.max_k3_kl:g})"
        )

    def _note(self, step: int, *, reused: bool, why: str) -> None:
        """Log the decision of a step if it differs from that of the step before."""
        if reused is not self._reused:
            if reused:
                logger.info("step %d: old_log_probs are the rollout's from here on: %s", step, why)
            else:
                logger.warning("step %d: the trainer computes all old_log_probs from here on: %s", step, why)
        self._reused = reused


def _rows(batch: DataProto, chosen: torch.Tensor) -> DataProto:
    return batch[chosen.nonzero().flatten().numpy()]


def _with_columns(batch: DataProto, old: torch.Tensor, recomputed: torch.Tensor) -> DataProto:
    return batch.union(DataProto.from_dict(tensors={"old_log_probs": old, RECOMPUTED: recomputed}))
