"""Arguments and results of the probes, and the rule for which exceptions of user code are errors."""

from __future__ import annotations

import dataclasses
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import verl
from verl.config import PPOConfig
from verl.extension.paths import expand_user
from verl.workers.reward.loop import RewardResult

# Exceptions that a fault of the code or of the config raises, and no missing service or device.
_FAULTS_OF_CODE = (
    *(TypeError, AttributeError, NameError, LookupError, ValueError, ArithmeticError, AssertionError),
    *(ImportError, NotImplementedError),
)
_NOT_USER_CODE = tuple(
    Path(path).resolve() for path in (verl.__path__[0], *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
)


@dataclass(frozen=True)
class Sample:
    """A row of the data, with the keys of an item of `RLHFDataset`, and its name for messages."""

    name: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The arguments of all probes.

    Attributes:
        config: the whole config, checked.
        kinds: the probes to run, in order.
        device: `cpu`, `cuda` or `npu`.
        elsewhere: the run is planned for another machine, which may have other packages and files.
        samples: pickled samples of an earlier child process; None: the child makes them.
    """

    config: PPOConfig
    kinds: tuple[str, ...]
    device: str
    elsewhere: bool
    samples: bytes | None = None


@dataclass
class Context:
    """A running job.

    Attributes:
        job: its arguments.
        connection: to the parent, see process.py for the messages.
        samples: at most one row of the training data and one of the validation data.
        rewards: results of the reward for these rows, without the failed ones.
    """

    job: Job
    connection: Connection
    samples: list[Sample] = field(default_factory=list)
    rewards: list[RewardResult] = field(default_factory=list)

    @property
    def config(self) -> PPOConfig:
        return self.job.config

    def step(self, text: str) -> None:
        """Tell the parent what runs next: its time limit starts; `text` names it if it hangs or ends the process."""
        self.connection.send(("step", text))

    def error(self, text: str) -> None:
        """Report a fault that the run would certainly meet."""
        self.connection.send(("error", text))

    def warn(self, text: str) -> None:
        """Report a fault that the run may meet."""
        self.connection.send(("warning", text))

    def note(self, text: str) -> None:
        """Report what was not checked."""
        self.connection.send(("note", text))

    def raised(self, label: str, error: BaseException, *, certain: bool | None = None) -> None:
        """Report an exception of user code.

        Args:
            label: the key of the config, its value, and the call.
            certain: True: an error; False: a warning; None: `is_certain` decides.
        """
        if self.is_certain(error) if certain is None else certain:
            self.error(f"{label} raised {summary(error)}; correct it")
        else:
            self.warn(f"{label} raised {summary(error)}; if the run would raise it too, correct it")

    def tokenizer(self, label: str) -> Any:
        """Return the tokenizer of the run; None, with a note about `label`, if it does not load."""
        from verl.utils.tokenizer import hf_tokenizer  # imports transformers, which a reward function does not need

        model = self.config.actor_rollout_ref.model
        path = model.tokenizer_path or model.path or ""
        self.step(f"{label}: loading the tokenizer")
        try:
            # A name on the hub would be looked up in the network.
            if self.job.elsewhere and not expand_user(path).is_dir():
                raise FileNotFoundError(f"{path} is not a directory here")
            return hf_tokenizer(path, trust_remote_code=model.trust_remote_code)
        except (ValueError, OSError) as error:
            self.note(f"{label}: not called, because the tokenizer does not load ({error})")
            return None

    def failed(self, error: Exception) -> None:
        """Report an error of verl's own, whose text is complete; its cause may be an exception of user code."""
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        (self.error if self.is_certain(cause) else self.warn)(str(error))

    def is_certain(self, error: BaseException) -> bool:
        """Return True for an exception that the run would meet as well.

        False for errors of files, network and devices, and for classes of exceptions that are not Python's: they may
        come from a service that does not run yet. A package or a device that is missing here, for which code may end
        its process, may exist on another machine.
        """
        if not isinstance(error, Exception):  # exit(), KeyboardInterrupt
            return not self.job.elsewhere
        if isinstance(error, OSError) or (self.job.elsewhere and isinstance(error, ImportError)):
            return False
        return isinstance(error, _FAULTS_OF_CODE)

    @contextmanager
    def reported(self, label: str, *, certain: bool | None = None) -> Iterator[None]:
        """Start a step and report its exceptions, `SystemExit` included; the code behind the block goes on."""
        self.step(label)
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self.raised(label, error, certain=certain)


def summary(error: BaseException) -> str:
    """Return the last line of a traceback, with the file and the line of the user's code."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1] + place(error)


def place(error: BaseException) -> str:
    """Return the innermost file and line of the user's code in a traceback, as " (file, line n)"; "" without one."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(Path(frame.filename).resolve())
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _is_library(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in _NOT_USER_CODE)


def with_samples(job: Job, kinds: tuple[str, ...], samples: bytes | None) -> Job:
    """Return the job of a new child process that runs only `kinds`."""
    return dataclasses.replace(job, kinds=kinds, samples=samples)
