"""The receiver of weight updates in an engine's worker, for verl's own updates and for vLLM's weight transfer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from verl.utils.vllm.reload import load_session
from verl.workers.rollout.quantization import WorkerSettings, worker_scheme
from verl.workers.weight_sync.receiver import WeightReceiver


def create_receiver(
    model: nn.Module, vllm_config: Any, device: torch.device, settings: WorkerSettings
) -> WeightReceiver:
    """Create the receiver of a worker.

    Args:
        model: the worker's part of the engine's model.
        vllm_config: the engine's `VllmConfig`.
        device: device of the model.
        settings: the result of `worker_settings`.

    Raises:
        ValueError: `settings` do not fit the checkpoint.
        NotImplementedError: this vLLM has no layer-wise reload.
    """
    scheme = worker_scheme(settings, vllm_config.model_config.model)
    session = load_session(model, vllm_config, device, scheme)
    return WeightReceiver(session, scheme, encodes=settings["quantization_side"] == "receiver")
