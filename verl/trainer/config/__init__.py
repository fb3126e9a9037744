"""Public import path of the config, and the directory of its YAML files.

The dataclasses are in `verl.config`, the checks in `verl.preflight`.
"""

from verl.config import *  # noqa: F403
from verl.config import __all__ as _config_names
from verl.preflight import Plan, check

__all__ = [*_config_names, "Plan", "check"]
