"""Public import path of the `algorithm` section; its dataclasses are in `verl.config.algorithm`."""

from verl.config.algorithm import AlgorithmConfig, FilterGroupsConfig, KLCtrlConfig, RolloutCorrectionConfig

__all__ = ["AlgorithmConfig", "FilterGroupsConfig", "KLCtrlConfig", "RolloutCorrectionConfig"]
