"""Micro-batches: the model input, and the grouping of samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.engine_cases import make_batch
from fixtures.mask_cases import with_sampling_masks
from verl.utils.sequence_ranks import SequenceRanks
from verl.workers.engine.micro_batch import (
    AlignedBatch,
    Layout,
    MicroBatching,
    equalize_counts,
    micro_batching,
    plan_micro_batches,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("limits", [MicroBatching(size=5), MicroBatching(max_tokens=40), MicroBatching(size=100)])
def test_micro_batches_equal_those_built_by_loops(layout, limits):
    data = make_batch(12)
    aligned = AlignedBatch(data, CPU, layout)
    seen = []
    for micro_batch in aligned.micro_batches(limits, None):
        of_rows = [data.batch["attention_mask"][row].bool() for row in micro_batch.sample_indices.tolist()]
        lengths = [int(mask.sum()) for mask in of_rows]
        width = {Layout.PACKED: None, Layout.ROWS: max(lengths), Layout.FULL_ROWS: 16}[layout]
        ids, positions, expected = [], [], []
        for b, (row, mask) in enumerate(zip(micro_batch.sample_indices.tolist(), of_rows, strict=True)):
            seen.append(row)
            tokens = data.batch["input_ids"][row][mask].tolist()
            prompt = int(data.batch["attention_mask"][row, :9].sum())
            for t in range(7):
                if data.batch["response_mask"][row, t]:
                    expected.append((len(ids) + prompt + t - 1, tokens[prompt + t], b * 7 + t))
            ids += tokens + [0] * ((width or len(tokens)) - len(tokens))
            positions += range(width or len(tokens))
        assert micro_batch.input_ids.shape == micro_batch.position_ids.shape
        assert micro_batch.input_ids.shape[0] == (1 if layout is Layout.PACKED else len(lengths))
        assert micro_batch.input_ids.flatten().tolist() == ids
        assert micro_batch.position_ids.flatten().tolist() == positions
        assert micro_batch.tokens == sum(lengths)
        found = (micro_batch.predictor_indices, micro_batch.targets, micro_batch.response_indices)
        assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
        if layout is Layout.PACKED:
            assert [n for count, n in micro_batch.sequences.runs for _ in range(count)] == lengths
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("layout", Layout)
def test_sampling_masks_follow_their_tokens(layout):
    data = with_sampling_masks(make_batch(12), vocab_size=80)
    masks = data.non_tensor_batch["sampling_masks"]
    data.batch["response_mask"][5, :2] = 0  # rejected tokens
    for micro_batch in AlignedBatch(data, CPU, layout).micro_batches(MicroBatching(size=5), None):
        places = micro_batch.response_indices.tolist()
        assert len(micro_batch.kept.ids) == len(places)
        for place, ids, valid in zip(places, micro_batch.kept.ids, micro_batch.kept.valid, strict=True):
            row, token = micro_batch.sample_indices[place // 7], place % 7
            assert ids[valid].tolist() == masks[row][token : token + 1].ids.tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("limits", [MicroBatching(size=5), MicroBatching(max_tokens=33), MicroBatching(size=1)])
def test_ranks_that_share_a_row_hold_its_parts(size, limits):
    """The parts in order are the row with padding, and each token is predicted by one rank."""
    data = with_sampling_masks(make_batch(12), vocab_size=80)
    whole = [*AlignedBatch(data, CPU).micro_batches(limits, None), AlignedBatch(data, CPU)._build(np.empty(0, int))]
    of_ranks = []
    for rank in range(size):
        sequence = SequenceRanks()
        sequence.size, sequence.rank = size, rank
        aligned = AlignedBatch(data, CPU, sequence=sequence)
        of_ranks.append([*aligned.micro_batches(limits, None), aligned._build(np.empty(0, int))])
    for row, *parts in zip(whole, *of_ranks, strict=True):
        tokens, n = row.input_ids.shape[1], parts[0].input_ids.shape[1]
        padding = size * n - tokens
        assert 0 <= padding < size and all(part.input_ids.shape == (1, n) for part in parts)
        ids, positions = (
            torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("input_ids", "position_ids")
        )
        assert ids[0].tolist() == row.input_ids[0].tolist() + [0] * padding
        assert positions[0].tolist() == row.position_ids[0].tolist() + list(range(padding))
        predictors = torch.cat([part.predictor_indices + rank * n for rank, part in enumerate(parts)])
        assert torch.equal(predictors, row.predictor_indices)
        assert torch.equal(torch.cat([part.targets for part in parts]), row.targets)
        everything = list(range(len(row.response_indices)))
        assert [i for part in parts for i in everything[part.own]] == everything
        for part in parts:
            assert torch.equal(part.response_indices, row.response_indices)
            assert part.tokens == row.tokens and torch.equal(part.sample_indices, row.sample_indices)
            runs = [length for count, length in part.sequences.runs for _ in range(count)]
            assert runs == [length for count, length in row.sequences.runs for _ in range(count)] + [padding] * (
                padding > 0
            )
            if part.kept is not None:
                kept = [ids[valid].tolist() for ids, valid in zip(*part.kept, strict=True)]
                own = (column[part.own] for column in row.kept)
                assert kept == [ids[valid].tolist() for ids, valid in zip(*own, strict=True)]


def test_without_sampling_masks_there_are_no_kept_tokens():
    (micro_batch,) = AlignedBatch(make_batch(4), CPU).micro_batches(MicroBatching(size=4), None)
    assert micro_batch.kept is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 300))
def test_the_token_limit_includes_padding(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    for packed in (True, False):
        plan = plan_micro_batches(lengths, MicroBatching(max_tokens=budget), packed=packed)
        assert sorted(i for part in plan for i in part.tolist()) == list(range(len(lengths)))
        for number, part in enumerate(plan):
            assert (lengths[part].sum() if packed else len(part) * lengths[part].max()) <= budget
            if number + 1 < len(plan):
                one_more = lengths[part].sum() + lengths[plan[number + 1][0]]
                assert (one_more if packed else (len(part) + 1) * lengths[part].max()) > budget


def test_samples_of_similar_length_are_grouped():
    plan = plan_micro_batches(np.array([3, 50, 4, 48, 5, 49]), MicroBatching(size=3))
    assert [sorted(part.tolist()) for part in plan] == [[1, 3, 5], [0, 2, 4]]


def test_a_sequence_above_the_token_limit_is_an_error():
    with pytest.raises(ValueError, match=r"a sequence of 51 tokens does not fit into .* of 50 tokens"):
        plan_micro_batches(np.array([3, 51]), MicroBatching(max_tokens=50))


def test_limits_in_tokens_are_those_of_one_rank():
    assert micro_batching(True, 3, 100, 4) == MicroBatching(max_tokens=400)
    assert micro_batching(False, 3, 100, 4) == MicroBatching(size=3)
    with pytest.raises(ValueError, match="micro_batch_size_per_gpu"):
        micro_batching(False, None, 100, 1)
    with pytest.raises(ValueError, match="max_token_len_per_gpu"):
        micro_batching(True, 3, None, 1)


@pytest.mark.parametrize("limits", [{}, {"size": 2, "max_tokens": 5}, {"size": 0}, {"max_tokens": -1}])
def test_invalid_limits_are_an_error(limits):
    with pytest.raises(ValueError, match="micro-batching"):
        MicroBatching(**limits)


def test_equalize_counts_returns_the_plan_of_a_single_rank():
    plan = [np.array([1, 0])]
    assert equalize_counts(plan, None, CPU) is plan


def test_a_response_token_needs_a_token_before_it():
    data = make_batch(4)
    data.batch["attention_mask"][0, :9] = 0
    data.batch["response_mask"][0, 0] = 1
    data.batch["attention_mask"][0, 9] = 1
    with pytest.raises(ValueError, match="response_mask"):
        AlignedBatch(data, CPU)
