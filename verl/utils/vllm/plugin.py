"""verl's vLLM plugin (entry-point group `vllm.general_plugins`), which vLLM loads in every process of an engine."""

from __future__ import annotations

import functools
import multiprocessing


def register() -> None:
    """Register verl's additions to vLLM; may be called again.

    CPU: quantization "ascend", fp8 without AMX, experts on several ranks, the permission to use AMX, and idle processes
    that block instead of spinning. NPU: patches. Everywhere: the user's modules (`model.external_lib`), which may
    register models, the weight transfer backend "verl", and signs of life for the watchdog of the run.
    """
    import torch
    from vllm.platforms import current_platform

    from verl.extension.external import import_from_environment
    from verl.utils.heartbeat import send_heartbeats_from_environment

    process = multiprocessing.current_process().name
    send_heartbeats_from_environment("" if process == "MainProcess" else process)
    import_from_environment()
    _register_weight_transfer()
    if current_platform.is_cpu():
        from verl.utils.vllm import ascend_cpu, cpu_experts, cpu_sleep_when_idle, fp8_cpu

        if torch.cpu._is_amx_tile_supported():
            # Linux ends a process that uses AMX without asking. vLLM's attention uses it for bfloat16, and asks only
            # if a matrix product in bfloat16 came first, which a quantized model may not have.
            torch.cpu._init_amx()
        ascend_cpu.register()
        cpu_experts.register()
        fp8_cpu.register()
        cpu_sleep_when_idle.sleep_when_idle()
    elif current_platform.device_type == "npu":
        from verl.utils.vllm.npu_vllm_patch import apply_patches

        apply_patches()


@functools.cache
def _register_weight_transfer() -> None:
    """Register `weight_transfer_config.backend="verl"`; its module is imported only by engines that select it."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return  # this vLLM has no weight transfer, so nobody can select a backend
    WeightTransferEngineFactory.register_engine(
        "verl", "verl.workers.rollout.vllm_rollout.weight_transfer", "VerlWeightTransferEngine"
    )
