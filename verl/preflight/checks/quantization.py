"""Checks `rollout.quantization` against the checkpoint and the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from verl.config.ppo import PPOConfig
from verl.extension.user_files import file_problem
from verl.preflight.findings import Findings
from verl.utils.model_dir.index import CheckpointIndex, has_weights, read_checkpoint_index
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.model_dir.shapes_from_config import index_of_config
from verl.utils.quantization.schemes import WeightFormat, weight_format

_FIELD = "actor_rollout_ref.rollout.quantization"


def check_quantization(config: PPOConfig, device: str, found: Findings) -> WeightFormat | None:
    """Check the scheme for an engine that starts on this machine, installed libraries included.

    Returns:
        The weight format of the engine; None if it is not quantized or if a check failed.
    """

    def check() -> WeightFormat:
        roles = config.actor_rollout_ref
        assert roles.model.path is not None
        chosen = weight_format(roles.rollout, roles.model.path)
        chosen.validate(device, installed=True)
        return chosen

    return _checked(config, device, check, found)


def check_planned_quantization(
    config: PPOConfig, device: str, model: ModelFiles, found: Findings
) -> WeightFormat | None:
    """Check the scheme from names and shapes alone: without torch and without installed libraries.

    Returns:
        As `check_quantization`; None too if the files of the model do not show its shapes.
    """

    def check() -> WeightFormat | None:
        chosen = weight_format(config.actor_rollout_ref.rollout, model.path, lambda: _index(model))
        if chosen.reads_checkpoint and model.parameters is None:
            chosen.validate_settings(device)
            return None
        chosen.validate(device, installed=False)
        return chosen

    return _checked(config, device, check, found)


def _checked(
    config: PPOConfig, device: str, check: Callable[[], WeightFormat | None], found: Findings
) -> WeightFormat | None:
    """Run a check and record its error under the name of the key."""
    rollout = config.actor_rollout_ref.rollout
    given = rollout.quantization_scheme is not None or rollout.quantization_self_test
    if rollout.quantization is None and device != "npu" and not given:
        return None
    file = rollout.quantization_config_file
    problem = None if file is None else file_problem(file)
    if problem is not None:
        found.errors.append(f"{_FIELD}_config_file={file}: {problem}; give a JSON file")
        return None
    try:
        chosen = check()
    except (ValueError, NotImplementedError, OSError) as error:
        text = str(error)
        # Readers of files do not know the key of the config.
        found.errors.append(text if _FIELD in text else f"{_FIELD}={rollout.quantization}: {text}")
        return None
    return None if rollout.quantization is None else chosen


def _index(model: ModelFiles) -> CheckpointIndex:
    if model.path.is_dir() and has_weights(model.path):
        return read_checkpoint_index(model.path)
    return index_of_config(Path(model.path), model.config)
