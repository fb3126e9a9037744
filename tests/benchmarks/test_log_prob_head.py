"""The counter of live bytes, and the memory of the output head of the policy."""

import pytest
import torch
from log_prob_head import LiveBytes, peak_bytes

SHAPE = {"rows": 16_384, "vocabulary": 151_936, "hidden": 1024}


def test_live_bytes_are_those_of_storages_that_exist_at_the_same_time():
    given = torch.zeros(100, device="meta")
    with LiveBytes() as counted:
        first = given + 1
        assert counted.now == 400
        first.mul_(2), given[:5], first[3:].view(97, 1)
        assert counted.now == counted.peak == 400
        second = first.double()
        assert counted.now == 1200
        del first, second
        assert counted.now == 0 and counted.peak == 1200


def test_the_logits_are_never_complete():
    shape = SHAPE | {"rows": 4096}
    assert peak_bytes("plain", **shape) > 4096 * 151_936 * 4
    assert peak_bytes("chunked", **shape) < 200e6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_large_micro_batch(dtype):
    assert peak_bytes("plain", dtype=dtype, **SHAPE) > 16_384 * 151_936 * dtype.itemsize
    assert peak_bytes("chunked", dtype=dtype, **SHAPE) < 300e6
    assert peak_bytes("chunked", dtype=dtype, update=False, **SHAPE) < 200e6
