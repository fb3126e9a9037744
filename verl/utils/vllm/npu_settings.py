"""Settings that vLLM and vllm-ascend need to accept new weights at run time on an NPU.

Imports neither torch nor vLLM, so that `verl doctor` can use it without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import Version

_NZ, _FUSED, _ALLOCATOR = "VLLM_ASCEND_ENABLE_NZ", "VLLM_ASCEND_ENABLE_FUSED_MC2", "PYTORCH_NPU_ALLOC_CONF"
# Releases of vllm-ascend: the first that reads `weight_nz_mode`, the first that reads no variable for it, and the first
# that releases the weights of latent attention unless `rl_config` is enabled.
_NZ_KEY, _NO_VARIABLES, _RL_CONFIG = Version("0.23.0"), Version("0.27.0"), Version("0.28.0")
_ADDITIONAL = "actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config"
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


def _at_least(release: str | None, oldest: Version) -> bool:
    """Return whether a release of vllm-ascend, if it is known, is at least `oldest` or a candidate of it."""
    return release is not None and Version(Version(release).base_version) >= oldest


def npu_environment(current: Mapping[str, str], release: str | None = None) -> dict[str, str]:
    """Return the environment variables of a replica on an NPU.

    Args:
        current: the existing environment; its values are kept, and the replica checks them.
        release: version of vllm-ascend; None if it is not installed here.
    """
    environment = {} if _at_least(release, _NO_VARIABLES) else {_NZ: current.get(_NZ, "0")}
    environment |= hccl_environment(current)
    if _ROLLOUT_QUEUE in current:
        environment[_QUEUE] = current[_ROLLOUT_QUEUE]
    return environment


def npu_additional_config(
    release: str, given: Mapping[str, Any] | None = None, *, latent_attention: bool = False
) -> dict[str, Any]:
    """Return the engine argument `additional_config`, with only the keys that the release reads.

    Releases from 0.27.1 on refuse unknown keys. With the default, `weight_nz_mode=1`, releases from 0.28 on hold MXFP8
    weights in NZ format.

    Args:
        release: version of vllm-ascend.
        given: the user's value, checked by `npu_setting_problems`.
        latent_attention: the model has multi-head latent attention.

    Raises:
        ValueError: the user disables `rl_config`, and the engine would release weights that an update needs.
    """
    config: dict[str, Any] = dict(given or {})
    if _at_least(release, _NZ_KEY):
        config["weight_nz_mode"] = 0
    if latent_attention and _at_least(release, _RL_CONFIG):
        rl_config = dict(config.get("rl_config") or {})
        if not rl_config.setdefault("enabled", True):
            raise ValueError(
                f"{_ADDITIONAL}.rl_config.enabled={rl_config['enabled']}: vllm-ascend {release} would release weights "
                "of latent attention that an update replaces; use True, or remove the key"
            )
        config["rl_config"] = rl_config
    return config


def check_npu_settings(
    environment: Mapping[str, str],
    *,
    sleep_mode: bool,
    engine_kwargs: Mapping[str, Any] | None = None,
    release: str | None = None,
) -> None:
    """Refuse settings with which an engine on an NPU cannot accept new weights.

    Raises:
        ValueError: the first of `npu_setting_problems`.
    """
    for problem in npu_setting_problems(
        environment, sleep_mode=sleep_mode, engine_kwargs=engine_kwargs, release=release
    ):
        raise ValueError(problem)


def npu_setting_problems(
    environment: Mapping[str, str],
    *,
    sleep_mode: bool,
    engine_kwargs: Mapping[str, Any] | None = None,
    release: str | None = None,
) -> list[str]:
    """Return the problems of an engine's settings on an NPU: name, value and required value of each.

    Args:
        environment: environment variables of the engine.
        sleep_mode: the engine sleeps between generations (`rollout.free_cache_engine`).
        engine_kwargs: `rollout.engine_kwargs.vllm`, whose `additional_config` overrides the environment from 0.23 on.
        release: version of vllm-ascend; None if it is not installed here.
    """
    problems = []
    additional = (engine_kwargs or {}).get("additional_config") or {}
    mode, fused = additional.get("weight_nz_mode", 0), additional.get("enable_fused_mc2", 0)
    nz = "weights in NPU's NZ format cannot be replaced"
    copies = "fused experts keep copies of the weights or cast them to NZ format, so no update reaches them"
    if mode not in (0, "0"):
        problems.append(f"{_ADDITIONAL}.weight_nz_mode={mode}: {nz}; use 0, or remove the key")
    if fused not in (0, "0", False):
        problems.append(f"{_ADDITIONAL}.enable_fused_mc2={fused}: {copies}; use 0, or remove the key")
    if not _at_least(release, _NO_VARIABLES):
        if (value := environment.get(_NZ, "1")) != "0":
            problems.append(f"{_NZ}={value}: {nz}, and waking the engine would raise; set {_NZ}=0")
        if (value := environment.get(_FUSED, "0")) != "0":
            problems.append(f"{_FUSED}={value}: {copies}; set {_FUSED}=0, or unset it")
    allocator = environment.get(_ALLOCATOR, "")
    settings = [setting.replace(" ", "").lower() for setting in allocator.split(",")]
    if sleep_mode and "expandable_segments:true" in settings:
        problems.append(
            f"{_ALLOCATOR}={allocator}: expandable_segments:True and the memory pool of sleeping engines exclude each "
            "other; remove it, or set actor_rollout_ref.rollout.free_cache_engine=False"
        )
    return problems
