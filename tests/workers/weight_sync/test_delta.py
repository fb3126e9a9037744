"""Tests of the wire format of a delta: every change arrives, in the smallest of the four encodings."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.tensor_diff import bits
from verl.workers.weight_sync.delta import DeltaBlock, DeltaChunk, decode, smallest_encoding
from verl.workers.weight_sync.manifest import WeightUpdateError

DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.uint8]


def random_bytes(length, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (length * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def changed_copy(old, share, seed):
    generator = torch.Generator().manual_seed(seed)
    picked = (torch.rand(old.numel(), generator=generator) < share).nonzero().squeeze(-1)
    new = old.clone()
    bits(new)[picked] = bits(new)[picked] ^ 1
    return new, picked


def apply(block, chunk, old):
    indices, values = decode(block, chunk)
    if indices is None:
        bits(old)[chunk.start : chunk.start + chunk.length] = bits(values)
    else:
        bits(old)[indices] = bits(values)


@settings(deadline=None, max_examples=60)
@given(
    length=st.sampled_from([1, 7, 255, 256, 257, 65535, 65536, 65537, 200_000]),
    share=st.sampled_from([0.0, 0.00002, 0.001, 0.02, 0.3, 0.95, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_changed_elements_arrive_and_no_others(length, share, dtype, seed):
    old = random_bytes(length, dtype, seed)
    new, picked = changed_copy(old, share, seed + 1)
    block = DeltaBlock()
    block.add("w", (length + 13,), 5, new, picked)
    sent = block.to_bytes()
    assert len(block.chunks) == (1 if len(picked) else 0)
    engine = torch.cat([random_bytes(5, dtype, 2), old, random_bytes(8, dtype, 3)])
    expected = torch.cat([random_bytes(5, dtype, 2), new, random_bytes(8, dtype, 3)])
    for chunk in block.chunks:
        apply(sent, DeltaChunk.from_message(chunk.to_message()), engine)
    assert torch.equal(bits(engine), bits(expected))


@pytest.mark.parametrize(
    ("share", "dtype", "encoding"),
    [
        (0.0002, torch.float8_e4m3fn, "index16"),
        (0.03, torch.bfloat16, "index8"),
        (0.5, torch.bfloat16, "bitmap"),
        (0.99, torch.float8_e4m3fn, "full"),
    ],
)
def test_smallest_encoding_is_chosen(share, dtype, encoding):
    old = random_bytes(1 << 20, dtype, 0)
    new, picked = changed_copy(old, share, 1)
    block = DeltaBlock()
    block.add("w", tuple(new.shape), 0, new, picked)
    assert block.chunks[0].encoding == encoding
    # Counted independently: blocks of 64 Ki and of 256 elements, a bit per element, or all values.
    n, c, size = 1 << 20, len(picked), dtype.itemsize
    candidates = {"index16": 4 * 16 + 2 * c, "index8": 4096 + c, "bitmap": n // 8, "full": (n - c) * size}
    assert abs(block.nbytes - (min(candidates.values()) + c * size)) <= 8


def test_block_with_all_elements_changed_does_not_overflow_its_count():
    assert smallest_encoding(1 << 20, 600, 1, fullest_block=255) == "index16"
    new = random_bytes(4096, torch.bfloat16, 0)
    old = new.clone()
    bits(old)[256:512] ^= 1
    block = DeltaBlock()
    picked = (bits(old) != bits(new)).nonzero().squeeze(-1)
    block.add("w", (4096,), 0, new, picked)
    apply(block.to_bytes(), block.chunks[0], old)
    assert torch.equal(bits(old), bits(new))


def test_negative_zero_is_a_change_and_equal_nan_bytes_are_not():
    old, new = torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, float("nan"), 1.0])
    assert (bits(old) != bits(new)).nonzero().flatten().tolist() == [0]


def valid_block_and_chunk():
    old = random_bytes(1000, torch.bfloat16, 0)
    new, picked = changed_copy(old, 0.05, 1)
    block = DeltaBlock()
    block.add("w", (1000,), 0, new, picked)
    return block.to_bytes(), block.chunks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1}, "does not lie inside it"),
        ({"start": -1}, "does not lie inside it"),
        ({"count": 2000}, "does not lie inside it"),
        ({"values_offset": 10**6}, "does not lie inside a block"),
        ({"encoding": "zip"}, "does not lie inside a block"),
        ({"encoding": "full"}, "out of range or out of order"),
        ({"count": 3}, "out of range or out of order"),
        ({"length": 300}, "out of range or out of order"),
        ({"values_offset": 3}, "misaligned"),
    ],
)
def test_contradictory_chunk_is_refused(changes, message):
    block, chunk = valid_block_and_chunk()
    with pytest.raises(WeightUpdateError, match=message):
        decode(block, DeltaChunk.from_message({**chunk.to_message(), **changes}))


def test_index_out_of_range_is_refused():
    block, chunk = valid_block_and_chunk()
    last = int(decode(block, chunk)[0][-1])
    decode(block, dataclasses.replace(chunk, length=last + 1))
    with pytest.raises(WeightUpdateError, match="out of range"):
        decode(block, dataclasses.replace(chunk, length=last))


def test_moved_chunk_is_found_behind_a_prefix():
    block, chunk = valid_block_and_chunk()
    moved = chunk.moved(64)
    behind = torch.cat([torch.zeros(64, dtype=torch.uint8), block])
    assert torch.equal(decode(behind, moved)[0], decode(block, chunk)[0])
