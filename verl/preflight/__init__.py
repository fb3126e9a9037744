"""Checks of a run before it starts: `check(config)` compares a config with model, data and machine.

It returns the `Plan` of the run, or raises a `ConfigError` that lists every problem. Imports no torch, Ray or vLLM.
"""

from verl.preflight.check import check, examine
from verl.preflight.plan import Plan

__all__ = ["Plan", "check", "examine"]
