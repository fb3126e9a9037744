"""Checks of `expert_parallel_size`: the devices of an engine share the experts of each layer, and hold them whole."""

from __future__ import annotations

from typing import Any, Protocol

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings
from verl.utils.model_dir.model_files import ModelFiles

_ENGINE_KWARGS = "actor_rollout_ref.rollout.engine_kwargs.vllm"
# vLLM's names of the number of experts in a config.json.
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
# Keys of vllm-ascend's `additional_config`, or of its section `eplb_config`, that give experts other ranks than vLLM.
_ASCEND_PLACEMENT = ("dynamic_eplb", "expert_map_path")


class _Engine(Protocol):
    """The keys of an engine's section that are read here."""

    @property
    def tensor_model_parallel_size(self) -> int: ...
    @property
    def expert_parallel_size(self) -> int: ...


def check_expert_parallel(section: str, engine: _Engine, files: ModelFiles, found: Findings) -> None:
    """Check the size, and that it divides the experts of the model.

    Args:
        section: the keys' section, of the rollout or of a teacher.
        engine: its values.
        files: of the engine's model.
    """
    size, devices = engine.expert_parallel_size, engine.tensor_model_parallel_size
    if size == 1:
        return
    field = f"{section}.expert_parallel_size={size}"
    if size != devices:
        found.add_size_error(
            f"{field}: must be 1 or {section}.tensor_model_parallel_size={devices}, because all devices of an engine "
            "share its experts; use one of these, or the same value for both keys"
        )
        return
    experts = files.number(*_EXPERTS)
    if not files.whole_config:
        return  # the model is known by name only
    if not experts:
        found.errors.append(
            f"{field}: the model in {files.path} has no experts (none of {', '.join(_EXPERTS)} in its config.json); "
            "use 1"
        )
    elif experts % size:
        found.errors.append(
            f"{field}: must divide the {experts} experts of the model in {files.path}, because vllm-ascend gives each "
            "device the same number; use 1, or a divisor for this key and for tensor_model_parallel_size"
        )


def check_expert_placement(config: PPOConfig, found: Findings) -> None:
    """Check that the engine's own arguments leave each expert where the config places it."""
    rollout = config.actor_rollout_ref.rollout
    vllm = rollout.engine_kwargs.get("vllm")
    arguments: dict[str, Any] = vllm if isinstance(vllm, dict) else {}
    enabled = arguments.get("enable_expert_parallel")
    if enabled is not None and bool(enabled) != (rollout.expert_parallel_size > 1):
        size = "the value of tensor_model_parallel_size" if enabled else "1"
        found.errors.append(
            f"{_ENGINE_KWARGS}.enable_expert_parallel={enabled}: would reach the engine but not the trainer; set "
            f"actor_rollout_ref.rollout.expert_parallel_size to {size}"
        )
    given = {"enable_eplb": arguments.get("enable_eplb")}
    additional = arguments.get("additional_config")
    section = additional.get("eplb_config") if isinstance(additional, dict) else None
    for prefix, values in (("additional_config", additional), ("additional_config.eplb_config", section)):
        if isinstance(values, dict):
            given |= {f"{prefix}.{name}": values.get(name) for name in _ASCEND_PLACEMENT}
    found.errors += [
        f"{_ENGINE_KWARGS}.{name}={value}: moves experts to other ranks while the engine runs, and a weight update "
        "would overwrite other experts; remove it"
        for name, value in given.items()
        if value
    ]
    placement = arguments.get("expert_placement_strategy", "linear")
    if placement != "linear":
        found.errors.append(
            f"{_ENGINE_KWARGS}.expert_placement_strategy={placement}: vllm-ascend computes with neighboring experts on "
            "a rank, wherever their weights were loaded to; use linear, or remove the key"
        )
