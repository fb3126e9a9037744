"""The addresses of the replicas in the config file of a Prometheus server (`rollout.prometheus`)."""

from __future__ import annotations

import http.client
import logging
import threading
from pathlib import Path
from typing import Any

import yaml

from verl.config.rollout import PrometheusConfig
from verl.utils.atomic_io import atomic_write_text

logger = logging.getLogger(__name__)

JOB = "rollout"
_KEY = "actor_rollout_ref.rollout.prometheus.file"
_NEW = {"global": {"scrape_interval": "10s", "evaluation_interval": "10s"}}
_SECONDS = 5


class PrometheusFile:
    """Writes the job `rollout`, and asks the Prometheus server to read the file again.

    Args:
        config: the section `actor_rollout_ref.rollout.prometheus`.
    """

    def __init__(self, config: PrometheusConfig) -> None:
        self._path, self._port = Path(config.file), config.port
        self._addresses: dict[int, str] = {}

    def add(self, rank: int, base_url: str) -> None:
        """Write the address of a replica that has started, also for the second time.

        Args:
            rank: number of the replica.
            base_url: for example `http://127.0.0.1:34567`.

        Raises:
            ValueError: the file is no config of a Prometheus server.
            OSError: the file cannot be written.
        """
        self._addresses[rank] = base_url.removeprefix("http://")
        content = self._read()
        jobs = [job for job in content.get("scrape_configs") or [] if job.get("job_name") != JOB]
        targets = [
            {"targets": [address], "labels": {"replica": str(number)}}
            for number, address in sorted(self._addresses.items())
        ]
        content["scrape_configs"] = [*jobs, {"job_name": JOB, "static_configs": targets}]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._path, yaml.safe_dump(content, sort_keys=False))
        # In a thread: a server that does not answer must not delay the start.
        threading.Thread(target=self._reload, name="prometheus-reload", daemon=True).start()

    def _read(self) -> dict[str, Any]:
        """Return the present content of the file; that of a new file if there is none."""
        try:
            content = yaml.safe_load(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return dict(_NEW)
        except yaml.YAMLError as error:
            raise ValueError(f"{_KEY}={self._path}: invalid YAML ({error}); repair or delete it") from error
        jobs = content.get("scrape_configs") or [] if isinstance(content, dict) else None
        if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
            raise ValueError(f"{_KEY}={self._path}: not a config of a Prometheus server; choose another file")
        return dict(content)

    def _reload(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS)
        try:
            connection.request("POST", "/-/reload")
            status = connection.getresponse().status
            problem = "" if status == http.client.OK else f"status {status}; start it with --web.enable-lifecycle"
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
        finally:
            connection.close()
        if problem:
            logger.info(
                "no Prometheus server on port %d has read %s (%s); it reads the file when it starts",
                *(self._port, self._path, problem),
            )
