"""Backends of other projects, imported only when configured: tensorboard, wandb, swanlab."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _require(module: str, backend: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"trainer.logger: {backend!r} cannot be used: {module} does not import ({error}); "
            f"run `pip install {install}` or remove {backend!r} from trainer.logger"
        ) from error


def _scalars(data: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in data.items() if isinstance(value, int | float)}


def _as_text(row: Mapping[str, Any]) -> str:
    return f"score {row.get('score')}\n\nprompt:\n{row.get('input')}\n\nresponse:\n{row.get('output')}"


class TensorboardBackend:
    """Scalars and sampled generations in an event file under `directory`; `config` is stored there as text.

    A resumed run hides the records that an earlier process wrote after `resume_step`.
    """

    def __init__(self, directory: str | Path, config_text: str, resume_step: int | None = None):
        tensorboard = _require("torch.utils.tensorboard", "tensorboard", "tensorboard")
        purge = None if resume_step is None else resume_step + 1
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=purge)
        self._writer.add_text("config", f"```\n{config_text}\n```", 0 if resume_step is None else resume_step)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        for name, value in _scalars(data).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for number, row in enumerate(rows):
            self._writer.add_text(f"val/generations/{number}", "```\n" + _as_text(row) + "\n```", step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class WandbBackend:
    """A Weights & Biases run. Account, mode and run id are wandb's own settings (WANDB_MODE, WANDB_RUN_ID, ...)."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], directory: str | Path):
        self._wandb = _require("wandb", "wandb", "'verl[wandb]'")
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._run = self._wandb.init(project=project, name=name, config=dict(config), dir=str(directory))

    def log(self, data: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(data), step=step)

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = self._wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self._run.log({"val/generations": table}, step=step)

    def finish(self) -> None:
        self._run.finish()


class SwanlabBackend:
    """A SwanLab experiment. Account and mode come from SwanLab's own settings (SWANLAB_API_KEY, SWANLAB_MODE, ...)."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], directory: str | Path):
        self._swanlab = _require("swanlab", "swanlab", "'verl[swanlab]'")
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._swanlab.init(project=project, experiment_name=name, config=dict(config), logdir=str(directory))

    def log(self, data: Mapping[str, Any], step: int) -> None:
        self._swanlab.log(_scalars(data), step=step)

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if rows:
            texts = [self._swanlab.Text(_as_text(row), caption=str(number)) for number, row in enumerate(rows)]
            self._swanlab.log({"val/generations": texts}, step=step)

    def finish(self) -> None:
        self._swanlab.finish()
