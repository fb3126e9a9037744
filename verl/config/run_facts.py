"""Facts about a run that several keys decide together; conditions read them as `run.<name>`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.config.profiles import profiles_rollout
from verl.config.roles import needs_critic, needs_ref
from verl.config.rollout_correction import Correction, resolve
from verl.config.weight_updates import full_update_reason, resolve_backend


@dataclass(frozen=True)
class RunFacts:
    """A config with the facts that follow from it.

    Attributes:
        config: a valid config.
        device: `cpu`, `cuda` or `npu`.
        rows_choose_loop: rows of the data may choose their agent loop.
    """

    config: PPOConfig
    device: str
    rows_choose_loop: bool

    def value(self, name: str) -> Any:
        """Return the value of a key by its dotted name, or of an attribute by `run.<name>`.

        Raises:
            AttributeError: no key or attribute has this name.
        """
        owner: Any = self.config
        if name.startswith("run."):
            owner, name = self, name.removeprefix("run.")
        return functools.reduce(getattr, name.split("."), owner)

    @property
    def needs_ref(self) -> bool:
        """True if the run holds a reference model."""
        return needs_ref(self.config)

    @property
    def needs_critic(self) -> bool:
        """True if the run trains a critic."""
        return needs_critic(self.config)

    @functools.cached_property
    def correction(self) -> Correction:
        """The rollout correction with its preset filled in."""
        return resolve(self.config.algorithm.rollout_correction)

    @property
    def profiles_rollout(self) -> bool:
        """True if the rollout engines are profiled."""
        return profiles_rollout(self.config)

    @property
    def loss(self) -> str:
        """The policy loss whose keys are read; in bypass mode, the loss that its `loss_type` corresponds to."""
        if self.correction.bypass_mode:
            return "vanilla" if self.correction.loss_type == "ppo_clip" else "gpg"
        return self.config.actor_rollout_ref.actor.policy_loss.loss_mode

    @property
    def loss_choice(self) -> str:
        """The choice of the policy loss, as the reason why the keys of other losses have no effect."""
        if self.correction.bypass_mode:
            return f"in bypass mode with loss_type={self.correction.loss_type}"
        return f"with actor.policy_loss.loss_mode={self.loss}"

    @property
    def user_loss(self) -> bool:
        """True for a policy loss of the user, which may read any key."""
        return self.loss not in names.POLICY_LOSSES

    @property
    def own_aggregation(self) -> bool:
        """True if the policy loss ignores `loss_agg_mode`."""
        return not self.user_loss and names.POLICY_LOSSES[self.loss].own_aggregation

    @property
    def backend(self) -> str:
        """Transport of the weight updates."""
        return resolve_backend(self.config, self.device)

    @property
    def full_update_reason(self) -> str | None:
        """Why every weight update is full; None if updates may send a delta."""
        return full_update_reason(self.config.actor_rollout_ref.rollout, self.device)
