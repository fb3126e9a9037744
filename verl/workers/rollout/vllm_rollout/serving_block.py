"""A model that must not be served: it raises an error instead of computing."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from verl.workers.weight_sync.manifest import WeightUpdateError


class ServingBlock:
    """Makes a model raise an error instead of computing, for as long as its weights must not be served.

    An error in a step ends the engine, and vLLM's `/health` then reports it. Clients avoid that by pausing the engine
    for the time of an update, as with every backend of vLLM's weight transfer.

    The hook alone would not be enough: a captured graph is replayed without a call of the model, but logits are always
    computed outside of it.

    Args:
        model: the model that vLLM's model runner calls.

    Attributes:
        reason: the text of the errors; None while the model computes.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._hook: Any = None
        self.reason: str | None = None

    def set(self, reason: str) -> None:
        """Block the model, or change the reason."""
        self.reason = reason
        if self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._refuse)
            vars(self._model)["compute_logits"] = self._refuse

    def clear(self) -> None:
        """Let the model compute again."""
        self.reason = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del vars(self._model)["compute_logits"]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise WeightUpdateError(f"the engine refuses to serve: {self.reason}")
