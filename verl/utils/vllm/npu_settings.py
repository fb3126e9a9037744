"""Settings that vLLM and vllm-ascend need to accept new weights at run time on an NPU.

Imports neither torch nor vLLM, so that `verl doctor` can use it without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NZ, _ALLOCATOR = "VLLM_ASCEND_ENABLE_NZ", "PYTORCH_NPU_ALLOC_CONF"
_QUEUE, _ROLLOUT_QUEUE = "TASK_QUEUE_ENABLE", "VLLM_ASCEND_TASK_QUEUE_ENABLE"
_PORTS = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")


def hccl_environment(current: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a process that uses HCCL.

    All processes of a communicator need the same values.

    Trainer, engine and broadcast proxy share an NPU, and HCCL's default is one port per NPU (16666 according to the
    description of HCCL_NPU_SOCKET_PORT_RANGE in the manual of CANN 9): a second process could not listen. With `auto`
    the operating system chooses the port.

    Args:
        current: the existing environment; its values are kept.
    """
    return {name: current.get(name, "auto") for name in _PORTS}


def npu_environment(current: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a replica on an NPU.

    Args:
        current: the existing environment; its values are kept, and the replica checks them.
    """
    environment = {_NZ: current.get(_NZ, "0"), **hccl_environment(current)}
    if _ROLLOUT_QUEUE in current:
        environment[_QUEUE] = current[_ROLLOUT_QUEUE]
    return environment


def check_npu_environment(
    environment: Mapping[str, str], *, sleep_mode: bool, engine_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Refuse settings with which an engine on an NPU cannot accept new weights.

    Args:
        sleep_mode: the engine sleeps between generations (`rollout.free_cache_engine`).
        engine_kwargs: `rollout.engine_kwargs.vllm`, whose `additional_config` overrides the environment from 0.23 on.

    Raises:
        ValueError: names the variable, its value and the required value.
    """
    mode = ((engine_kwargs or {}).get("additional_config") or {}).get("weight_nz_mode", 0)
    if mode != 0:
        raise ValueError(
            f"actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.weight_nz_mode={mode}: weights in NPU's "
            "NZ format cannot be replaced; use 0, or remove the key"
        )
    for problem in npu_environment_problems(environment, sleep_mode=sleep_mode):
        raise ValueError(problem)


def npu_environment_problems(environment: Mapping[str, str], *, sleep_mode: bool) -> list[str]:
    """Return the problems of an engine's environment on an NPU: variable, value and required value of each."""
    problems = []
    nz = environment.get(_NZ, "1")
    if nz != "0":
        problems.append(
            f"{_NZ}={nz}: weights in NPU's NZ format cannot be replaced, and waking the engine would raise; set {_NZ}=0"
        )
    allocator = environment.get(_ALLOCATOR, "")
    settings = [setting.replace(" ", "").lower() for setting in allocator.split(",")]
    if sleep_mode and "expandable_segments:true" in settings:
        problems.append(
            f"{_ALLOCATOR}={allocator}: expandable_segments:True and the memory pool of sleeping engines exclude each "
            "other; remove it, or set actor_rollout_ref.rollout.free_cache_engine=False"
        )
    return problems
