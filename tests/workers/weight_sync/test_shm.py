"""Tests of memory that is shared between processes."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment


def own_segment(pipe):
    segment = SharedSegment(4096)
    segment.bytes[:3] = 7
    pipe.send(segment.handle)
    pipe.recv()


def read_in_child(handle, queue):
    queue.put(SegmentReader().open(handle)[:4].tolist())


def count_mappings():
    return Path("/proc/self/maps").read_text().count("memfd:verl-weights")


def mapped_and_ended(reader):
    """Map a segment of a process, end the process, and return the handle."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=own_segment, args=(theirs,))
    process.start()
    handle = ours.recv()
    assert reader.open(handle)[:3].tolist() == [7, 7, 7]
    ours.send(None)
    process.join()
    return handle


@pytest.mark.slow
def test_reader_unmaps_the_memory_of_ended_processes():
    reader, before = SegmentReader(), count_mappings()
    for _ in range(2):
        handle = mapped_and_ended(reader)
        # Mapping the second segment has dropped the first one.
        assert count_mappings() == before + 1
    with pytest.raises(WeightUpdateError, match="cannot be opened"):
        reader.open({**handle, "fd": handle["fd"] + 1})
    assert count_mappings() == before
    mapped_and_ended(reader)
    reader.drop_ended()
    assert count_mappings() == before


def test_segment_is_shared_between_processes_and_leaves_no_name():
    before = set(os.listdir("/dev/shm"))
    segment = SharedSegment(1000)
    segment.bytes[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=read_in_child, args=(segment.handle, queue))
    child.start()
    assert queue.get() == [1, 2, 3, 4]
    child.join()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "verl" in name]
    segment.close()


def test_segment_of_an_ended_sender_raises_an_error_that_says_so():
    segment = SharedSegment(10)
    handle = segment.handle
    segment.close()
    with pytest.raises(WeightUpdateError, match="cannot be opened"):
        SegmentReader().open(handle)
