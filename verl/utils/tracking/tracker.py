"""One call per step to every backend in `trainer.logger`."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from verl.utils.tracking.console import ConsoleBackend
from verl.utils.tracking.external import SwanlabBackend, TensorboardBackend, WandbBackend
from verl.utils.tracking.jsonl import METRICS_FILE, FileBackend
from verl.utils.tracking.plain import mask_secrets, to_plain

logger = logging.getLogger(__name__)

TENSORBOARD_DIRECTORY = "tensorboard"
# They have records of their own elsewhere, and may fail to open for many reasons.
_REMOTE = ("swanlab", "wandb")
# Backends of upstream verl that are not supported here; other unknown names are misspelled.
UNSUPPORTED_BACKENDS = ("clearml", "mlflow", "rl_insight", "trackio", "vemlp_wandb")


class Backend(Protocol):
    """Destination of metrics. `data` holds plain Python values; a step may come twice, but steps never decrease."""

    def log(self, data: Mapping[str, Any], step: int) -> None: ...

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...

    def finish(self) -> None: ...


class Tracking:
    """Sends metrics and sampled generations to the chosen backends. A backend that fails later does not end the run.

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
        before_files: is called once before a backend writes below `default_local_dir`, when those that write elsewhere
            are open.

    Raises:
        ValueError: unknown backend; its package does not import; it cannot be opened.
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
        before_files: Callable[[], None] = lambda: None,
    ):
        backends = [default_backend] if isinstance(default_backend, str) else list(default_backend)
        _check_names(backends, self.BACKENDS)
        directory = Path(default_local_dir or Path("checkpoints", project_name, experiment_name))
        shown = mask_secrets(config)
        make: dict[str, Callable[[], Backend]] = {
            "console": lambda: ConsoleBackend(total_steps, resume_step or 0),
            "file": lambda: FileBackend(file_path or directory / METRICS_FILE, resume_step),
            "tensorboard": lambda: TensorboardBackend(
                directory / TENSORBOARD_DIRECTORY, json.dumps(shown, indent=2, ensure_ascii=False), resume_step
            ),
            "wandb": lambda: WandbBackend(project_name, experiment_name, shown, directory),
            "swanlab": lambda: SwanlabBackend(project_name, experiment_name, shown, directory / "swanlog"),
        }
        self._backends: dict[str, Backend] = {}
        self._failed: set[str] = set()
        try:
            for name in (name for name in _REMOTE if name in backends):
                self._backends[name] = _opened(name, make[name])
            before_files()
            for name in dict.fromkeys(backends):
                if name not in _REMOTE:
                    self._backends[name] = _opened(name, make[name])
        except BaseException:
            self.finish()
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
                self._call(name, receiver.log, plain, int(step))

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log sampled generations: one mapping per sample with `input`, `output`, `score` (see `samples_table`)."""
        plain = [to_plain(row, lenient=True) for row in rows]
        for name, backend in self._backends.items():
            self._call(name, backend.log_generations, plain, int(step))

    def finish(self) -> None:
        """Flush and close every backend; may be called twice."""
        backends, self._backends = self._backends, {}
        for name, backend in reversed(backends.items()):
            self._call(name, backend.finish)

    def _call(self, name: str, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of a backend. An error costs records of this backend and not the run: warn once."""
        try:
            method(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (other packages raise anything)
            if name not in self._failed:
                self._failed.add(name)
                logger.warning(
                    "trainer.logger: %r failed (%s: %s): records are missing there; the run continues, and further "
                    "errors of %r are not shown",
                    name,
                    type(error).__name__,
                    error,
                    name,
                )

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()


def _opened(name: str, make: Callable[[], Backend]) -> Backend:
    try:
        return make()
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.filename):
            raise
        raise ValueError(
            f"trainer.logger: {name!r} cannot be opened ({type(error).__name__}: {error}); correct its settings, use "
            f"its offline mode, or remove {name!r} from trainer.logger"
        ) from error


def _check_names(backends: Sequence[str], known: Sequence[str]) -> None:
    for name in backends:
        if name in UNSUPPORTED_BACKENDS:
            raise NotImplementedError(
                f"trainer.logger={list(backends)}: {name!r} is not supported yet; use any of {list(known)}"
            )
        if name not in known:
            raise ValueError(f"trainer.logger={list(backends)}: unknown backend {name!r}; use any of {list(known)}")
