"""Settings under which vLLM and vllm-ascend can take new weights while they run on an NPU.

Imports neither torch nor vLLM: `verl doctor` says the same where neither is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NZ, _ALLOCATOR = "VLLM_ASCEND_ENABLE_NZ", "PYTORCH_NPU_ALLOC_CONF"
_QUEUE, _ROLLOUT_QUEUE = "TASK_QUEUE_ENABLE", "VLLM_ASCEND_TASK_QUEUE_ENABLE"
_PORTS = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")


def hccl_environment(current: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of every process that communicates by HCCL; of one communicator all need the same.

    Trainer, engine and relay share an NPU, and HCCL's default is one port for each NPU (16666, says the description of
    HCCL_NPU_SOCKET_PORT_RANGE in the manual of CANN 9): the second process could not listen. `auto` leaves the choice
    to the operating system.

    Args:
        current: the environment to start from; what it sets is kept.
    """
    return {name: current.get(name, "auto") for name in _PORTS}


def npu_environment(current: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that a replica on an NPU is started with.

    Args:
        current: the environment to start from; what it sets is kept, and checked in the replica.
    """
    environment = {_NZ: current.get(_NZ, "0"), **hccl_environment(current)}
    if _ROLLOUT_QUEUE in current:
        environment[_QUEUE] = current[_ROLLOUT_QUEUE]
    return environment


def check_npu_environment(
    environment: Mapping[str, str], *, sleep_mode: bool, engine_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Refuse settings under which an engine on an NPU cannot take new weights.

    Args:
        sleep_mode: the engine sleeps between generations (`rollout.free_cache_engine`).
        engine_kwargs: `rollout.engine_kwargs.vllm`, whose `additional_config` overrides the environment from 0.23 on.

    Raises:
        ValueError: naming the variable, its value and the one needed.
    """
    mode = ((engine_kwargs or {}).get("additional_config") or {}).get("weight_nz_mode", 0)
    if mode != 0:
        raise ValueError(
            f"actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.weight_nz_mode={mode}: weights in NPU's "
            "NZ format cannot be replaced; use 0, or leave it out"
        )
    for problem in npu_environment_problems(environment, sleep_mode=sleep_mode):
        raise ValueError(problem)


def npu_environment_problems(environment: Mapping[str, str], *, sleep_mode: bool) -> list[str]:
    """What is wrong with the environment of an engine on an NPU: each the variable, its value and the one needed."""
    problems = []
    nz = environment.get(_NZ, "1")
    if nz != "0":
        problems.append(
            f"{_NZ}={nz}: weights in NPU's NZ format cannot be replaced, waking the engine up would raise; set {_NZ}=0"
        )
    allocator = environment.get(_ALLOCATOR, "")
    settings = [setting.replace(" ", "").lower() for setting in allocator.split(",")]
    if sleep_mode and "expandable_segments:true" in settings:
        problems.append(
            f"{_ALLOCATOR}={allocator}: expandable_segments:True and the memory pool of sleeping engines exclude each "
            "other; remove it, or set actor_rollout_ref.rollout.free_cache_engine=False"
        )
    return problems
