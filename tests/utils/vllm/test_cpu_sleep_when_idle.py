"""A process of an engine that waits uses no processor time."""

import multiprocessing
import time

import pytest

from verl.utils.vllm.plugin import register


def read_two(handle, connection):
    """Return the processor seconds that a reader uses while it waits for the second message."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    register()
    queue = MessageQueue.create_from_handle(handle, 0)
    connection.send("ready")
    queue.wait_until_ready()
    assert queue.dequeue() == "first"
    begin = time.process_time()
    connection.send("read")
    assert queue.dequeue() == "second"
    connection.send(time.process_time() - begin)


@pytest.mark.slow
def test_the_reader_of_a_queue_sleeps_until_the_next_message():
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    register()
    queue = MessageQueue(n_reader=1, n_local_reader=1)
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("spawn").Process(target=read_two, args=(queue.export_handle(), theirs))
    reader.start()
    try:
        assert ours.recv() == "ready"
        queue.wait_until_ready()
        queue.enqueue("first")
        assert ours.recv() == "read"
        time.sleep(1.0)  # as long as vLLM's readers would spin
        queue.enqueue("second")
        assert ours.recv() < 0.1
    finally:
        reader.kill()
        reader.join()
