"""Indices of differing elements, with the compiled kernel and with torch operators."""

import pytest
import torch

from verl.utils.native import library as native
from verl.utils.tensor_diff import bits, diff_and_update_, diff_and_update_rounded_


@pytest.fixture(params=["compiled", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    else:
        assert native.kernels() is not None, "no C compiler on this machine: the kernel cannot be tested"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 64, 800, 801])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_indices_of_changed_elements(implementation, dtype, size, share, offset):
    """With an `offset` in elements the bytes do not start at a word."""
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(0, 256, ((size + offset) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    kept = raw.view(dtype)[offset:]
    now = kept.clone()
    expected = (torch.rand(size, generator=generator) < share).nonzero().squeeze(-1)
    bits(now)[expected] ^= 1
    before = bits(now).clone()
    assert torch.equal(diff_and_update_(kept, now), expected)
    assert torch.equal(bits(kept), before) and torch.equal(bits(now), before)


@pytest.mark.parametrize("threads", [1, 2, 3, 100])
def test_number_of_threads_does_not_change_the_indices(threads):
    generator = torch.Generator().manual_seed(threads)
    kept = torch.randint(0, 256, (10_007,), dtype=torch.uint8, generator=generator)
    now = torch.where(torch.rand(10_007, generator=generator) < 0.02, 255 - kept, kept)
    expected = (kept != now).nonzero().squeeze(-1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(diff_and_update_(kept, now), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kept, now)


@pytest.mark.parametrize("kept_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0, 1, 31, 2048, 2049, 5000, 70_001])
def test_kept_tensor_may_have_a_rounded_dtype(implementation, kept_dtype, size):
    generator = torch.Generator().manual_seed(size)
    before = torch.randn(size, generator=generator)
    now = before * (1 + 1e-3 * torch.randn(size, generator=generator))
    kept, rounded = before.to(kept_dtype), now.to(kept_dtype)
    expected = (kept != rounded).nonzero().squeeze(-1)
    assert not size or len(expected) > 0 or size < 31
    assert torch.equal(diff_and_update_rounded_(kept, now), expected)
    assert torch.equal(bits(kept), bits(rounded))
    assert not diff_and_update_rounded_(kept, now).numel()


def test_rounding_keeps_nan_and_overflows_to_infinity(implementation):
    now = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 0x3F808000, 0x3F818000], dtype=torch.int32).view(
        torch.float32
    )
    kept = torch.zeros(5, dtype=torch.bfloat16)
    assert diff_and_update_rounded_(kept, now).tolist() == [0, 1, 2, 3, 4]
    assert kept[:2].isnan().all() and kept[2:].tolist() == [float("inf"), 1.0, 1.015625]


def test_signed_zeros_differ_and_equal_nan_does_not(implementation):
    kept = torch.tensor([0.0, torch.nan, 1.0])
    assert diff_and_update_(kept, torch.tensor([-0.0, torch.nan, 1.0])).tolist() == [0]


@pytest.mark.parametrize("now", [torch.zeros(7), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2]])
def test_mismatch_is_rejected_before_memory_is_accessed(implementation, now):
    with pytest.raises(ValueError, match="cannot compare the kept"):
        diff_and_update_(torch.zeros(8), now)


@pytest.mark.parametrize("now", [torch.zeros(7), torch.zeros(16)[::2]])
def test_mismatch_is_rejected_before_rounding(implementation, now):
    with pytest.raises(ValueError, match="cannot compare the kept"):
        diff_and_update_rounded_(torch.zeros(9, dtype=torch.bfloat16), now)
