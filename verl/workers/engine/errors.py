"""Errors of a training step."""

from __future__ import annotations

_MAX_SHOWN = 16


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is NaN or infinite; raised before the optimizer changes a weight.

    Attributes:
        quantity: "loss" or "gradient norm".
        global_step: the training step, None if the batch did not contain it.
        uids: prompt ids of the samples involved, sorted, without duplicates.
    """

    def __init__(self, quantity: str, global_step: int | None, uids: list[str]):
        super().__init__(quantity, global_step, uids)
        self.quantity = quantity
        self.global_step = global_step
        self.uids = uids

    def __str__(self) -> str:
        more = f" and {len(self.uids) - _MAX_SHOWN} more" if len(self.uids) > _MAX_SHOWN else ""
        samples = ", ".join(self.uids[:_MAX_SHOWN]) + more if self.uids else "unknown"
        return (
            f"{self.quantity} is not finite at global_step={self.global_step}; samples (uid): {samples}. This "
            "mini-batch changed no weight: check the rewards and log-probabilities of these samples, or lower "
            "actor.optim.lr, and resume from the last checkpoint"
        )
