"""The end of a process and of all its child processes, on any node of the cluster, even if they are stopped."""

from __future__ import annotations

import contextlib

import psutil
import ray

from verl.single_controller.placement import on_node


async def kill_family(node_id: str, pid: int) -> None:
    """Send SIGKILL to a process and to its descendants. No effect on processes that have ended.

    Ray asks a process to end; a process that is stopped (SIGSTOP) does not, and its child processes are unknown to Ray.

    Args:
        node_id: Ray's id of the node on which the process runs.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        _kill(pid)
        return
    # A node that is gone took its processes along.
    with contextlib.suppress(ray.exceptions.RayError):
        await ray.remote(_kill).options(**on_node(node_id), max_retries=0).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
