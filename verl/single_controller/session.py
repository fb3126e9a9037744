"""The Ray session of a run: join an existing cluster, or start one and shut it down at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import ray

from verl.config import PPOConfig
from verl.single_controller.local_cluster import local_cluster
from verl.utils.network import ray_cluster, require_ray_cluster

logger = logging.getLogger(__name__)


class RaySession:
    """A context manager that joins a Ray cluster or starts one; `ray.init` gets the keys `ray_kwargs.ray_init.*`."""

    def __init__(self, config: PPOConfig):
        self._options: dict[str, Any] = {
            "include_dashboard": False,
            # Workers report through results and exceptions; their output goes to Ray's log directory.
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            **ray_init_options(config.ray_kwargs.ray_init or {}),
        }
        self._joined = ray.is_initialized()
        self._stack = ExitStack()

    def __enter__(self) -> RaySession:
        if not self._joined:
            if ray_cluster(os.environ, asked=self._options.get("address")) is not None:
                # Ray accepts these only for a session that it starts.
                for key in ("num_cpus", "num_gpus", "include_dashboard"):
                    self._options.pop(key, None)
                require_ray_cluster(os.environ, asked=self._options.get("address"))
                ray.init(**self._options)
                self._stack.callback(ray.shutdown)
            else:
                self._stack.enter_context(local_cluster(self._options))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            logger.error("logs of all processes: %s", os.path.join(_session_directory(), "logs"))
        self._stack.close()


def ray_init_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `ray_kwargs.ray_init` as arguments of `ray.init`: without null, and with environment variables as text.

    On a command line `env_vars.NAME=1` is a number, and Ray takes text only.
    """
    options = {name: value for name, value in given.items() if value is not None}
    environment = dict(options.get("runtime_env") or {})
    if environment.get("env_vars"):
        environment["env_vars"] = {name: str(value) for name, value in environment["env_vars"].items()}
        options["runtime_env"] = environment
    return options


def _session_directory() -> str:
    node = ray._private.worker._global_node
    return node.get_session_dir_path() if ray.is_initialized() and node is not None else "Ray's session directory"
