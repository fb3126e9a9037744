import multiprocessing
from pathlib import Path

from verl.workers.weight_sync.shm import SegmentReader, SharedSegment


def own(pipe):
    segment = SharedSegment(4096)
    segment.bytes[:3] = 7
    pipe.send(segment.handle)
    pipe.recv()


def mapped():
    return Path("/proc/self/maps").read_text().count("memfd:verl-weights")


def test_memory_of_a_process_that_ended_is_given_up_with_the_next_one_s():
    context, reader, before = multiprocessing.get_context("spawn"), SegmentReader(), mapped()
    for _ in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=own, args=(theirs,))
        process.start()
        assert reader.open(ours.recv())[:3].tolist() == [7, 7, 7]
        assert mapped() == before + 1
        ours.send(None)
        process.join()
