"""Builds a model in a release's environment: vLLM's CPU platform, vllm-ascend's quantization, the stand-in's operators.

To be imported inside an environment of `build_env.py` only.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401  (before vllm_ascend, whose modules read torch.npu)
import vllm_ascend.quantization.modelslim_config as modelslim_config  # registers "ascend" with vLLM
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

RELEASE = os.environ["CONTRACT_RELEASE"]
AscendModelSlimConfig = modelslim_config.AscendModelSlimConfig


def make_vllm_config(model_dir: Path, description: Mapping[str, Any] | None, **over: Any) -> VllmConfig:
    """vLLM's configuration as an engine would make it, with `description` where the rollout puts it."""
    supported = current_platform.supported_quantization
    if supported and "ascend" not in supported:
        supported.append("ascend")
    arguments = {
        "model": str(model_dir),
        "quantization": "ascend" if description is not None else None,
        "hf_overrides": {"quantization_config": dict(description)} if description is not None else {},
        "dtype": "bfloat16",
        "load_format": "auto",
        "enforce_eager": True,
        "max_model_len": 128,
        # The wheel's compiled operators are of another torch: every layer takes its form in Python.
        "compilation_config": {"custom_ops": ["none"]},
        **over,
    }
    return EngineArgs(**arguments).create_engine_config()


@contextmanager
def engine(config: VllmConfig, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """Tensor-parallel ranks over gloo, and vllm-ascend's own configuration, while a model is built and run.

    Of several ranks the default process group has to be there already, and stays.
    """
    import vllm_ascend.ascend_config as ascend_config
    from vllm.model_executor.layers import rotary_embedding

    _stand_in_for_compiled_operators()
    with tempfile.TemporaryDirectory() as directory, set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{directory}/rendezvous", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        try:
            ascend_config.init_ascend_config(config)
            yield
        finally:
            ascend_config._ASCEND_CONFIG = None
            # Models of one process share these, and an update that failed leaves them without memory.
            rotary_embedding._ROPE_DICT.clear()
            destroy_model_parallel()
            if ranks == 1:
                destroy_distributed_environment()


def build_model(config: VllmConfig) -> nn.Module:
    """vLLM's own `get_model`: construction, loading as `load_format` says, processing after loading."""
    from vllm.model_executor.model_loader import get_model

    before = torch.get_default_dtype()
    try:
        return get_model(vllm_config=config)
    finally:
        # Where building fails vLLM leaves the model's dtype behind as the default.
        torch.set_default_dtype(before)


def schemes(model: nn.Module) -> dict[str, str]:
    """Layer name -> the class of its vllm-ascend scheme, or of its method where it is not quantized."""
    found = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            found[name] = type(getattr(method, "quant_method", None) or method).__name__
    return found


def _stand_in_for_compiled_operators() -> None:
    """Layers that look an operator up while they are built, whether or not they will call it."""
    if not hasattr(torch.ops._C, "silu_and_mul"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
        _kept.append(library)


_kept: list[torch.library.Library] = []
