"""Errors of a training step."""

from __future__ import annotations

_SHOWN = 16


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is NaN or infinite; raised before the optimizer changes a weight.

    Attributes:
        what: "loss" or "gradient norm".
        global_step: the step it happened in, None where the batch did not say.
        uids: the prompts' ids of the samples involved, sorted, each once.
    """

    def __init__(self, what: str, global_step: int | None, uids: list[str]):
        super().__init__(what, global_step, uids)
        self.what = what
        self.global_step = global_step
        self.uids = uids

    def __str__(self) -> str:
        more = f" and {len(self.uids) - _SHOWN} more" if len(self.uids) > _SHOWN else ""
        samples = ", ".join(self.uids[:_SHOWN]) + more if self.uids else "unknown"
        return (
            f"{self.what} is not finite at global_step={self.global_step}; samples (uid): {samples}. No weight was "
            "changed in this mini-batch: resume from the last checkpoint, with a lower actor.optim.lr or after looking "
            "at the rewards and log-probabilities of these samples"
        )
