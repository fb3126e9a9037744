"""The child process of the probes: imports user code, calls it, and sends each finding as soon as it is known."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection

from verl.extension.external import KEY, import_external
from verl.trainer.probes.context import Context
from verl.trainer.probes.kinds import LABELS
from verl.trainer.probes.rows import read_samples
from verl.utils.child_process import end_with_parent


def main(socket_fd: int, parent_pid: int) -> None:
    """Receive the kinds and import their modules; then receive a `Job` and run its probes.

    The parent closes the connection instead of sending a job if there is nothing to probe.
    """
    os.set_inheritable(socket_fd, False)
    end_with_parent(parent_pid)
    connection = Connection(socket_fd)
    probes: dict[str, Callable[[Context], None]] = {}
    missing: dict[str, ImportError] = {}
    try:
        for kind in connection.recv():
            try:
                probes[kind] = importlib.import_module(f"verl.trainer.probes.{kind}").probe
            except ImportError as error:  # a config may be checked where the packages of a run are not installed
                missing[kind] = error
        context = Context(connection.recv(), connection)
    except EOFError:
        return
    config = context.config
    with context.reported(f"{KEY}: the import"):
        import_external(config.actor_rollout_ref.model.external_lib or ())
    if context.job.samples is not None:
        context.samples = pickle.loads(context.job.samples)
    elif not config.data.custom_cls.path:
        with context.reported("data.train_files, data.val_files: reading the first row"):
            context.samples = read_samples(config)
    for kind in context.job.kinds:
        connection.send(("kind", kind))
        if kind in missing:
            context.note(f"{LABELS[kind]}: not called ({missing[kind]})")
        else:
            with context.reported(f"the check of {LABELS[kind]}", certain=False):
                probes[kind](context)
    connection.send(("end", ""))
