"""Move the names of keys in upstream verl, also of earlier versions, to their current names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from verl.config.errors import ConfigError

_BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"
# Old name -> current name. A trailing dot means all keys of a section. The first match wins.
_MOVED = (
    ("custom_reward_function.reward_kwargs.", "reward.reward_kwargs."),
    ("custom_reward_function.reward_kwargs", "reward.reward_kwargs"),
    ("custom_reward_function.overlong_buffer.", f"{_BUFFER}."),
    ("custom_reward_function.overlong_buffer", _BUFFER),
    ("custom_reward_function.", "reward.custom_reward_function."),
    ("custom_reward_function", "reward.custom_reward_function"),
    ("reward_model.reward_kwargs.", "reward.reward_kwargs."),
    ("reward_model.reward_kwargs", "reward.reward_kwargs"),
    ("reward_model.overlong_buffer_cfg.", f"{_BUFFER}."),
    ("reward_model.overlong_buffer_cfg", _BUFFER),
    ("reward_model.overlong_buffer.", f"{_BUFFER}."),
    ("reward_model.overlong_buffer", _BUFFER),
    ("reward_model.reward_manager.", "reward.reward_manager."),
    ("reward_model.reward_manager", "reward.reward_manager.name"),
    ("reward_model.num_workers", "reward.num_workers"),
    ("reward_model.model.path", "reward.reward_model.model_path"),
    ("reward_model.", "reward.reward_model."),
    # The section `rollout` of asynchronous runs.
    ("rollout.nnodes", "actor_rollout_ref.rollout.nnodes"),
    ("rollout.n_gpus_per_node", "actor_rollout_ref.rollout.n_gpus_per_node"),
    ("rollout.test_freq", "trainer.test_freq"),
    ("rollout.total_epochs", "trainer.total_epochs"),
    ("reward_manager.", "reward.reward_manager."),
    *(
        (f"{model}.override_config.model_config{dot}", f"{model}.override_config{dot}")
        for model in ("actor_rollout_ref.model", "critic.model")
        for dot in (".", "")
    ),
    # Upstream verl has one section for each of its two trainers.
    ("skip.rollout_tq.", "skip.rollout."),
    ("ray_init.", "ray_kwargs.ray_init."),
    ("ray_init", "ray_kwargs.ray_init"),
    # Further keys of a sampler are its own.
    *((key, key) for key in ("data.sampler.class_path", "data.sampler.class_name", "data.sampler.kwargs")),
    ("data.sampler.kwargs.", "data.sampler.kwargs."),
    ("data.sampler.", "data.sampler.kwargs."),
    ("actor_rollout_ref.actor.grad_clip", "actor_rollout_ref.actor.optim.clip_grad"),
    ("actor_rollout_ref.actor.optim.warmup_style", "actor_rollout_ref.actor.optim.lr_scheduler_type"),
    ("critic.grad_clip", "critic.optim.clip_grad"),
    ("critic.optim.warmup_style", "critic.optim.lr_scheduler_type"),
    ("critic.model.fsdp_config.", "critic.fsdp."),
    (
        "algorithm.rollout_correction.bypass_old_logprob_for_rollout",
        "algorithm.rollout_correction.bypass_mode",
    ),
)
_OLD_SECTIONS = ("custom_reward_function", "reward_model", "ray_init")


def current_name(key: str) -> str:
    """Return the current dotted name of a key, which is `key` itself if the key did not move."""
    for old, new in _MOVED:
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return key


def migrate(
    values: Mapping[str, Any],
    given: Collection[str] = (),
    is_default: Callable[[str, Any], bool] = lambda key, value: False,
) -> dict[str, Any]:
    """Return nested values with all old names moved to their current names.

    Args:
        values: values by old or current name.
        given: current names of keys that an override set; they keep that value.
        is_default: returns True if an old key has the default of upstream verl. As with null, a value under the current
            name then has precedence.

    Raises:
        ConfigError: an old section is not a mapping.
    """
    result = {name: _copy(value) for name, value in values.items()}
    for old, value in _pop_old_sections(result) + _old_leaves(result):
        _remove(result, old.split("."))
        new = current_name(old)
        unset = (value is None or is_default(old, value)) and _has(result, new.split("."))
        if new not in given and not unset:
            _put(result, new.split("."), value)
    return result


def _pop_old_sections(values: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for section in _OLD_SECTIONS:
        if section not in values:
            continue
        if not isinstance(values[section], dict):
            raise ConfigError(
                [f"{section}={values[section]}: this is a section, which is now called {current_name(section)}"]
            )
        found += _leaves(values.pop(section), section)
    return found


def _old_leaves(values: dict[str, Any]) -> list[tuple[str, Any]]:
    leaves = [leaf for name, section in values.items() for leaf in _leaves(section, name)]
    return [(key, value) for key, value in leaves if current_name(key) != key]


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in _leaves(item, f"{path}.{name}")]
    return [] if value == {} else [(path, value)]


def _copy(value: Any) -> Any:
    return {name: _copy(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _remove(values: dict[str, Any], path: list[str]) -> None:
    """Delete a key and the sections that become empty, because an empty old section would be an unknown key."""
    name, *inner = path
    if name not in values:
        return
    if inner:
        _remove(values[name], inner)
    if not inner or not values[name]:
        del values[name]


def _has(values: dict[str, Any], path: list[str]) -> bool:
    """Return True if a key has a value other than null."""
    inner: Any = values
    for name in path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    return inner is not None


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        inner = values.get(name)
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[path[-1]] = value
