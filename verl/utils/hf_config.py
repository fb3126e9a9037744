"""The config of a Hugging Face model with the fields of `model.override_config` replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Selects code of transformers. Engines choose their own attention backend.
ATTENTION_BACKEND = "attn_implementation"
# The backends of transformers that run on a CPU, so that a run compares them before it loads the model.
COMPARED_BACKENDS = ("sdpa", "eager")


def read_config(
    path: str, trust_remote_code: bool, override: Mapping[str, Any], section: str = "actor_rollout_ref.model"
) -> PreTrainedConfig:
    """Return the model's config with some fields replaced.

    Raises:
        ValueError: the config has no such field.
    """
    from transformers import AutoConfig

    config, unused = AutoConfig.from_pretrained(
        path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **override
    )
    unknown = sorted(set(unused) & set(override))
    if unknown:
        raise ValueError(
            f"{section}.override_config: unknown key {', '.join(unknown)} for {type(config).__name__}; see "
            f"{path}/config.json for its fields"
        )
    return config


def overridden_fields(path: str, trust_remote_code: bool, override: Mapping[str, Any]) -> dict[str, Any]:
    """Return the top-level fields of the config that `override` changes, with their values in the trainer's config.

    They differ from the override itself where transformers moves a value: `rope_theta` changes `rope_parameters`.

    Args:
        override: `override_config`, the attention backend included, which is not a field.

    Raises:
        ValueError: the config has no such field.
    """
    fields = {name: value for name, value in override.items() if name != ATTENTION_BACKEND}
    if not fields:
        return {}
    original = read_config(path, trust_remote_code, {}).to_dict()
    changed = read_config(path, trust_remote_code, fields).to_dict()
    return {name: value for name, value in changed.items() if name not in original or original[name] != value}
