"""Creates the configuration of an engine on vLLM's NPU platform and prints facts about it as JSON.

Run in an environment of `build_env.py` with `npu_platform=True`.
"""

import json
import sys

import torch
import torch_npu  # noqa: F401

torch.utils.rename_privateuse1_backend("npu")


def main(model_dir: str) -> None:
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm_ascend.ascend_config import get_ascend_config

    from verl.config import ModelConfig, RolloutConfig
    from verl.utils.quantization.schemes import weight_format
    from verl.utils.vllm.npu_vllm_patch import apply_patches
    from verl.utils.vllm.vllm_fp8_utils import is_mxfp8_vllm_ascend
    from verl.workers.rollout.vllm_rollout.engine_args import engine_args

    load_general_plugins()
    rollout = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1, enforce_eager=True)
    arguments = engine_args(
        rollout,
        ModelConfig(path=model_dir),
        device="npu",
        dtype="bfloat16",
        prompt_length=16,
        response_length=16,
        seed=0,
        quantization=weight_format(rollout, model_dir).engine_overrides("npu"),
    )
    config = AsyncEngineArgs(**arguments).create_engine_config()
    facts = {
        "device_type": current_platform.device_type,
        "quant_config": type(config.quant_config).__name__,
        "is_mxfp8_vllm_ascend": is_mxfp8_vllm_ascend(config.quant_config),
        "worker": config.parallel_config.worker_cls,
        "extension": config.parallel_config.worker_extension_cls,
        "sleep_mode": config.model_config.enable_sleep_mode,
        # 0.18.0 reads the environment variable only.
        "weight_nz_mode": getattr(get_ascend_config(), "weight_nz_mode", None),
        "patched again": apply_patches(),
    }
    sys.stdout.write(f"\n{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
