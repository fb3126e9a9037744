import pytest
import torch

from verl.utils.quantization import native
from verl.workers.rollout.weight_sync.changes import take_changes
from verl.workers.rollout.weight_sync.delta import bits


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    else:
        assert native.kernels() is not None, "no C compiler here: the kernel cannot be tested"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 64, 800, 801])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_places_that_changed(way, dtype, size, share, offset):
    """`offset`: of elements, so that the bytes do not begin at a word."""
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(0, 256, ((size + offset) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    kept = raw.view(dtype)[offset:]
    now = kept.clone()
    expected = (torch.rand(size, generator=generator) < share).nonzero().squeeze(-1)
    bits(now)[expected] ^= 1
    before = bits(now).clone()
    assert torch.equal(take_changes(kept, now), expected)
    assert torch.equal(bits(kept), before) and torch.equal(bits(now), before)


@pytest.mark.parametrize("threads", [1, 2, 3, 100])
def test_threads_share_the_work(threads):
    generator = torch.Generator().manual_seed(threads)
    kept = torch.randint(0, 256, (10_007,), dtype=torch.uint8, generator=generator)
    now = torch.where(torch.rand(10_007, generator=generator) < 0.02, 255 - kept, kept)
    expected = (kept != now).nonzero().squeeze(-1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(take_changes(kept, now), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kept, now)


def test_zeros_of_either_sign_and_the_same_nan(way):
    kept = torch.tensor([0.0, torch.nan, 1.0])
    assert take_changes(kept, torch.tensor([-0.0, torch.nan, 1.0])).tolist() == [0]


@pytest.mark.parametrize("now", [torch.zeros(7), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2]])
def test_what_does_not_match_is_refused_before_memory_is_touched(way, now):
    with pytest.raises(ValueError, match="is kept"):
        take_changes(torch.zeros(8), now)
