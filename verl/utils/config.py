"""Config sections as dataclasses, under upstream verl's name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl.extension.upstream_names import missing_names

__all__ = ["omega_conf_to_dataclass"]
__getattr__ = missing_names(__name__)


def omega_conf_to_dataclass(config: Any, dataclass_type: type[Any] | None = None) -> Any:
    """Return a section as a dataclass. The sections of `verl.config` are dataclasses and are returned unchanged.

    Args:
        config: a dataclass instance; or a mapping or an OmegaConf config, with a mapping for each dataclass inside.
        dataclass_type: class of the result for a mapping. Keys that the mapping lacks keep their defaults.

    Raises:
        TypeError: `config` is neither, or a mapping without `dataclass_type`.
        ValueError: the dataclass has no such key.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return config
    if config is None:
        return None if dataclass_type is None else dataclass_type()
    values: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if not isinstance(values, Mapping) or dataclass_type is None:
        raise TypeError(
            f"omega_conf_to_dataclass: {str(config)[:80]!r} is no section of verl.config; pass a mapping and its "
            "dataclass_type"
        )
    hints = typing.get_type_hints(dataclass_type)
    known = {field.name: hints[field.name] for field in dataclasses.fields(dataclass_type)}
    unknown = [name for name in values if name not in known and name != "_target_"]
    if unknown:
        raise ValueError(
            f"omega_conf_to_dataclass: unknown key {', '.join(map(str, unknown))}; {dataclass_type.__name__} has "
            + ", ".join(known)
        )
    return dataclass_type(
        **{
            name: omega_conf_to_dataclass(value, known[name]) if dataclasses.is_dataclass(known[name]) else value
            for name, value in values.items()
            if name != "_target_"
        }
    )
