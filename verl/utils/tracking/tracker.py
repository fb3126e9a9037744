"""One call per step to every backend in `trainer.logger`."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from verl.utils.tracking.console import ConsoleBackend
from verl.utils.tracking.external import SwanlabBackend, TensorboardBackend, WandbBackend
from verl.utils.tracking.jsonl import FileBackend
from verl.utils.tracking.plain import mask_secrets, to_plain

# Backends of upstream verl that are not supported here; other unknown names are misspelled.
UNSUPPORTED_BACKENDS = ("clearml", "mlflow", "rl_insight", "trackio", "vemlp_wandb")


class Backend(Protocol):
    """Destination of metrics. `data` holds plain Python values; a step may come twice, but steps never decrease."""

    def log(self, data: Mapping[str, Any], step: int) -> None: ...

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...

    def finish(self) -> None: ...


class Tracking:
    """Sends metrics and sampled generations to the chosen backends.

    Args:
        project_name: project of wandb and swanlab.
        experiment_name: name of the run there.
        default_backend: names of backends, any of `Tracking.BACKENDS`; one name may be text.
        config: the run's configuration, shown by trackers; secrets in it are masked first.
        default_local_dir: directory of the run; backends write below it by default. None:
            checkpoints/PROJECT_NAME/EXPERIMENT_NAME.
        file_path: file of the `file` backend; DEFAULT_LOCAL_DIR/metrics.jsonl by default.
        resume_step: step of the checkpoint that the run resumes from, None for a fresh run. Records of later steps,
            written by the process that died, are dropped.
        total_steps: last step of the run, for the console's "3/20" and the time left.

    Raises:
        ValueError: unknown backend, or its package does not import.
        NotImplementedError: a backend of upstream verl that is not supported yet.
        OSError: a backend's file cannot be written.
    """

    BACKENDS = ("console", "file", "swanlab", "tensorboard", "wandb")

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        default_backend: str | Sequence[str] = "console",
        config: Any = None,
        default_local_dir: str | Path | None = None,
        file_path: str | Path | None = None,
        resume_step: int | None = None,
        total_steps: int | None = None,
    ):
        backends = [default_backend] if isinstance(default_backend, str) else list(default_backend)
        _check_names(backends, self.BACKENDS)
        directory = Path(default_local_dir or Path("checkpoints", project_name, experiment_name))
        shown = mask_secrets(config)
        make: dict[str, Callable[[], Backend]] = {
            "console": lambda: ConsoleBackend(total_steps, resume_step or 0),
            "file": lambda: FileBackend(file_path or directory / "metrics.jsonl", resume_step),
            "tensorboard": lambda: TensorboardBackend(
                directory / "tensorboard", json.dumps(shown, indent=2, ensure_ascii=False), resume_step
            ),
            "wandb": lambda: WandbBackend(project_name, experiment_name, shown, directory),
            "swanlab": lambda: SwanlabBackend(project_name, experiment_name, shown, directory / "swanlog"),
        }
        self._backends: dict[str, Backend] = {}
        self._finishers = ExitStack()
        try:
            for name in dict.fromkeys(backends):
                backend = make[name]()
                self._backends[name] = backend
                self._finishers.callback(backend.finish)
        except BaseException:
            self._finishers.close()
            raise

    def log(self, data: Mapping[str, Any], step: int, backend: Sequence[str] | None = None) -> None:
        """Log metrics of a step.

        The `file` backend merges metrics of the same step into one line. A step can therefore be logged before its
        checkpoint is saved, and again afterwards with more metrics: a kill in between then loses no step.

        Args:
            data: metric name to number (Python, numpy or torch scalar) or text.
            step: training step; must not decrease.
            backend: names of the receiving backends, all by default; names that the run lacks are ignored.

        Raises:
            TypeError: a value has no plain form; names the metric.
        """
        plain = {}
        for name, value in data.items():
            try:
                plain[name] = to_plain(value)
            except TypeError as error:
                raise TypeError(f"metric {name!r}: {error}") from error
        for name, receiver in self._backends.items():
            if backend is None or name in backend:
                receiver.log(plain, int(step))

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log sampled generations: one mapping per sample with `input`, `output`, `score` (see `samples_table`)."""
        plain = [to_plain(row, lenient=True) for row in rows]
        for backend in self._backends.values():
            backend.log_generations(plain, int(step))

    def finish(self) -> None:
        """Flush and close every backend, even if one of them fails; may be called twice."""
        self._finishers.close()

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()


def _check_names(backends: Sequence[str], known: Sequence[str]) -> None:
    for name in backends:
        if name in UNSUPPORTED_BACKENDS:
            raise NotImplementedError(
                f"trainer.logger={list(backends)}: {name!r} is not supported yet; use any of {list(known)}"
            )
        if name not in known:
            raise ValueError(f"trainer.logger={list(backends)}: unknown backend {name!r}; use any of {list(known)}")
