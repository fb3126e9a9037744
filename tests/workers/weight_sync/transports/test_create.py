"""Tests of the choice of a transport."""

import pytest

from verl.workers.weight_sync.transports.create import backend_on


@pytest.mark.parametrize(
    ("device", "backend", "meant"),
    [("npu", "nccl", "hccl"), ("npu", "hccl", "hccl"), ("npu", "gloo", "gloo"), ("cuda", "nccl", "nccl")],
)
def test_nccl_means_hccl_on_an_npu(device, backend, meant):
    assert backend_on(device, backend) == meant
