"""The log-probabilities that an engine returns are those of its `logprobs_mode`."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def apply_logprobs_mode(runner: Any, mode: str) -> None:
    """Give the engine's `logprobs_mode` to its sampler, if the sampler was built without it.

    The model runner of vllm-ascend 0.18 to 0.30 builds its sampler with the default, `raw_logprobs`. The engine would
    then return log-probabilities of another distribution than the one that it samples from: without the temperature,
    and without top-p and top-k.

    Args:
        runner: the model runner of a worker. Runners without a sampler are left alone.
        mode: vLLM's `logprobs_mode`.
    """
    sampler = getattr(runner, "sampler", None)
    for part in (sampler, getattr(sampler, "topk_topp_sampler", None)):
        if part is not None and part.logprobs_mode != mode:
            logger.info("%s returned %s; it returns %s from now on", type(part).__name__, part.logprobs_mode, mode)
            part.logprobs_mode = mode
