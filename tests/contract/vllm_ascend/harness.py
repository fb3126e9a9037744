"""Builds a model in the environment of a release: vLLM's CPU platform, vllm-ascend's quantization, stand-in operators.

Import it only in an environment of `build_env.py`.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401  (before vllm_ascend, whose modules read torch.npu)
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils as layer_utils
from vllm.platforms import current_platform
from vllm_ascend.quantization import AscendModelSlimConfig  # registers "ascend" with vLLM

from verl.utils.vllm.npu_settings import npu_additional_config

RELEASE = os.environ["CONTRACT_RELEASE"]
modelslim_config = sys.modules[AscendModelSlimConfig.__module__]


def make_vllm_config(model_dir: Path, description: Mapping[str, Any] | None, **over: Any) -> VllmConfig:
    """Create vLLM's configuration as an engine does, with `description` in the place that the rollout uses."""
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
        # The wheel's compiled operators are for another torch, so every layer uses its Python implementation.
        "compilation_config": {"custom_ops": ["none"]},
        # What verl passes to an engine of this release.
        "additional_config": npu_additional_config(RELEASE),
        **over,
    }
    return EngineArgs(**arguments).create_engine_config()


@contextmanager
def engine(config: VllmConfig, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """Set up tensor-parallel ranks over gloo and vllm-ascend's own configuration while a model is built and run.

    With several ranks the default process group must exist already, and is kept.
    """
    import vllm_ascend.ascend_config as ascend_config
    from vllm.model_executor.layers import rotary_embedding

    _leave_out_compiled_operators()
    with tempfile.TemporaryDirectory() as directory, set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{directory}/rendezvous", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        try:
            ascend_config.init_ascend_config(config)
            yield
        finally:
            ascend_config._ASCEND_CONFIG = None
            # All models of one process share these; a failed update leaves them without memory.
            rotary_embedding._ROPE_DICT.clear()
            destroy_model_parallel()
            if ranks == 1:
                destroy_distributed_environment()


def build_model(config: VllmConfig) -> nn.Module:
    """Run vLLM's `get_model`: construction, loading by `load_format`, processing after loading."""
    from vllm.model_executor.model_loader import get_model

    before = torch.get_default_dtype()
    try:
        return get_model(vllm_config=config)
    finally:
        # If building fails, vLLM leaves the dtype of the model as the default.
        torch.set_default_dtype(before)


def schemes(model: nn.Module) -> dict[str, str]:
    """Return layer name -> class name of its vllm-ascend scheme, or of its method if it is not quantized."""
    found = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            found[name] = type(getattr(method, "quant_method", None) or method).__name__
    return found


def _leave_out_compiled_operators() -> None:
    """Define operators that layers look up while they are built, and let no layer choose one for its product."""
    if not hasattr(torch.ops._C, "silu_and_mul"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
        _libraries.append(library)
    # From vLLM 0.28 on, a processor with AMX chooses a compiled product for small weights.
    layer_utils.check_cpu_sgl_kernel = lambda *_: False


_libraries: list[torch.library.Library] = []
