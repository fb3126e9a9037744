"""Hydra plugin: any Hydra program can use `ppo_trainer` in its defaults list, because Hydra finds plugins here."""

from verl.config.searchpath import VerlSearchPath

__all__ = ["VerlSearchPath"]
