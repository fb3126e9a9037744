"""`rollout.quantization` against the checkpoint and the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings
from verl.preflight.planned_quantization import PlannedQuantization, plan_quantization
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.user_files import file_problem

T = TypeVar("T")


class Quantization(Protocol):
    """What the plan says of it."""

    def summary(self) -> str: ...

    def update_bytes(self, itemsize: int) -> int | None: ...


def check_quantization(config: PPOConfig, device: str, found: Findings) -> Quantization | None:
    """Ask the scheme for what the engine would be started with; None without one, or where it refuses."""
    roles = config.actor_rollout_ref

    def ask() -> Quantization:
        # Here, not above: schemes are about tensors, and this package is importable without torch.
        from verl.workers.rollout.quantization import get_scheme

        assert roles.model.path is not None
        scheme = get_scheme(roles.rollout, roles.model.path)
        scheme.engine_overrides(device)
        return scheme

    return _asked(config, device, ask, found)


def check_planned_quantization(
    config: PPOConfig, device: str, model: ModelFiles, found: Findings
) -> PlannedQuantization | None:
    """The same, of names and shapes alone: without torch, and without what an installation has."""
    return _asked(config, device, lambda: plan_quantization(config.actor_rollout_ref.rollout, model, device), found)


def _asked(config: PPOConfig, device: str, ask: Callable[[], T], found: Findings) -> T | None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.quantization is None and device != "npu":
        return None
    file = rollout.quantization_config_file
    problem = None if file is None else file_problem(file)
    if problem is not None:
        found.errors.append(f"actor_rollout_ref.rollout.quantization_config_file={file}: {problem}; give a JSON file")
        return None
    try:
        return ask()
    except (ValueError, NotImplementedError, OSError) as error:
        text, field = str(error), "actor_rollout_ref.rollout.quantization"
        # What is wrong with a file or a layer is said by those who know nothing of the config.
        found.errors.append(text if field in text else f"{field}={rollout.quantization}: {text}")
        return None
