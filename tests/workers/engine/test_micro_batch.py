"""Micro-batches: the model input, and the grouping of samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.engine_cases import make_batch
from fixtures.mask_cases import with_sampling_masks
from verl.workers.engine.micro_batch import AlignedBatch, Layout, MicroBatching, equalize_counts, plan_micro_batches

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
    with pytest.raises(ValueError, match=r"a sequence of 51 tokens does not fit into .*max_token_len_per_gpu=50"):
        plan_micro_batches(np.array([3, 51]), MicroBatching(max_tokens=50))


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
