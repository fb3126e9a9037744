"""Tensors that move to host memory and back; the CPU stands for a device with memory of its own."""

import pytest
import torch

from verl.workers.engine import host_memory
from verl.workers.engine.host_memory import HostCopy, HostMemory

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(host_memory, "_BLOCK_BYTES", 48)


def test_values_and_views_return(small_blocks):
    """Tensors larger and smaller than a block, one without elements, and two views of the same memory."""
    tensors = [torch.arange(40.0), torch.arange(3, dtype=torch.bfloat16), torch.empty(0), torch.arange(10)]
    shared = tensors[0][5:9].view(2, 2)
    expected = [tensor.clone() for tensor in (*tensors, shared)]
    copy = HostCopy(lambda: [*tensors, shared], HostMemory(CPU))
    for _ in range(2):
        copy.offload()
        assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert copy.nbytes == 40 * 4 + 3 * 2 + 10 * 8
        assert len(copy._blocks) == -(-copy.nbytes // 48)
        copy.offload()  # again, without effect
        copy.load()
        copy.wait()
        for tensor, value in zip((*tensors, shared), expected, strict=True):
            assert torch.equal(tensor, value)
        copy.load()


def test_only_changed_values_are_copied_to_the_host():
    tensor = torch.zeros(4)
    copy = HostCopy(lambda: [tensor], HostMemory(CPU))
    copy.offload()
    copy.load()
    tensor.fill_(1)
    copy.offload()
    copy.load()
    assert not tensor.any()
    tensor.fill_(2)
    copy.mark_changed()
    copy.offload()
    copy.load()
    assert (tensor == 2).all()


def test_tensors_may_be_replaced_while_they_are_on_the_device():
    tensors = [torch.zeros(4)]
    copy = HostCopy(lambda: tensors, HostMemory(CPU))
    copy.offload()
    copy.load()
    tensors[:] = [torch.ones(6), torch.ones(2)]
    copy.mark_changed()
    copy.offload()
    assert copy.nbytes == 32
    copy.load()
    assert all(tensor.all() for tensor in tensors)


def test_nothing_to_move_is_no_error():
    copy = HostCopy(list, HostMemory(CPU))
    copy.offload()
    copy.load()
    copy.wait()


def test_a_cpu_has_no_other_memory():
    assert host_memory.host_memory(CPU) is None
