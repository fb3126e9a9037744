"""Hydra discovers plugins in this namespace package: any Hydra program can use `ppo_trainer` as a default."""

from verl.config.searchpath import VerlSearchPath

__all__ = ["VerlSearchPath"]
