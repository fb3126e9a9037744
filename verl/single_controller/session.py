"""The Ray session of a run: join an existing cluster, or start one and shut it down at the end."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import Any

import ray

from verl.config import PPOConfig
from verl.utils.network import ray_cluster, require_ray_cluster

logger = logging.getLogger(__name__)


class RaySession:
    """A context manager around `ray.init` and `ray.shutdown`; `ray.init` gets the keys `ray_kwargs.ray_init.*`."""

    def __init__(self, config: PPOConfig):
        self._options: dict[str, Any] = {
            "include_dashboard": False,
            # Workers report through results and exceptions; their output goes to Ray's log directory.
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            **{key: value for key, value in dict(config.ray_kwargs.ray_init or {}).items() if value is not None},
        }
        self._joined = ray.is_initialized()

    def __enter__(self) -> RaySession:
        if not self._joined:
            if ray_cluster(os.environ, asked=self._options.get("address")) is not None:
                # Ray accepts these only for a session that it starts.
                for key in ("num_cpus", "num_gpus", "include_dashboard"):
                    self._options.pop(key, None)
                require_ray_cluster(os.environ, asked=self._options.get("address"))
            ray.init(**self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            logger.error("logs of all processes: %s", os.path.join(_session_directory(), "logs"))
        if not self._joined:
            ray.shutdown()


def _session_directory() -> str:
    node = ray._private.worker._global_node
    return node.get_session_dir_path() if ray.is_initialized() and node is not None else "Ray's session directory"
