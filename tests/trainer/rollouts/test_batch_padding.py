"""Joined batches of different widths, compared with the layout of all samples at once."""

import numpy as np
import pytest
import torch

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.protocol import DataProto
from verl.trainer.rollouts.batch_padding import pad_and_concat
from verl.workers.reward import RewardResult

PAD = 9


def sample(prompt, response, score=1.0, uid="0", **extra):
    """Build a sample with tokens 1, 2, ...; each position has another log-probability and version."""
    row = {"uid": uid, "data_source": "d", "reward_model": {}, "raw_prompt": []}
    output = AgentLoopOutput(
        prompt_ids=list(range(1, prompt + 1)),
        response_ids=list(range(1, response + 1)),
        response_mask=[1 - i % 3 // 2 for i in range(response)],
        response_logprobs=[-0.5 - i for i in range(response)],
        weight_versions=[3 + i for i in range(response)],
    )
    return ScoredSample(row, output, RewardResult(score, extra, None, 0.0))


def lay_out(*samples):
    return to_batch(samples, pad_token_id=PAD, with_log_probs=True)


def assert_same(ours, expected):
    assert set(ours.batch.keys()) == set(expected.batch.keys())
    for name, column in expected.batch.items():
        assert ours.batch[name].dtype == column.dtype, name
        assert torch.equal(ours.batch[name], column), name
    assert set(ours.non_tensor_batch) == set(expected.non_tensor_batch)
    for name, column in expected.non_tensor_batch.items():
        assert ours.non_tensor_batch[name].tolist() == column.tolist(), name


LENGTHS = [
    [[(3, 5), (1, 2)], [(2, 7)], [(6, 1), (4, 4), (1, 1)]],
    [[(3, 3)], [(3, 3), (2, 1)]],  # batches of equal width, and prompts as wide as responses
    [[(1, 0)], [(2, 4)]],  # an empty response has one column of padding
    [[(1, 0)], [(2, 0)]],
    [[(5, 5), (2, 2)]],
]


@pytest.mark.parametrize("parts", LENGTHS)
def test_joined_batches_equal_one_layout_of_all_samples(parts):
    parts = [[sample(*lengths, score=i + j / 8) for j, lengths in enumerate(part)] for i, part in enumerate(parts)]
    joined = pad_and_concat([lay_out(*part) for part in parts], PAD)
    assert_same(joined, lay_out(*(one for part in parts for one in part)))


@pytest.mark.parametrize("parts", LENGTHS)
def test_padding_for_dropped_rows_is_removed(parts):
    parts = [[sample(*lengths) for lengths in part] for part in parts]
    long = sample(8, 9)
    batches = [lay_out(*part, long)[: len(part)] for part in parts]
    assert batches[0].batch["responses"].shape[1] == 9
    assert_same(pad_and_concat(batches, PAD), lay_out(*(one for part in parts for one in part)))


def test_added_columns_are_aligned_by_their_width():
    first, second = lay_out(sample(3, 2), sample(2, 2)), lay_out(sample(1, 4))
    for batch, value in ((first, 0.5), (second, 0.25)):
        rows, width = batch.batch["responses"].shape
        full_width = batch.batch["input_ids"].shape[1]
        batch.batch["old_log_probs"] = torch.full((rows, width), value)
        batch.batch["flags"] = torch.ones(rows, width, dtype=torch.bool)
        batch.batch["experts"] = torch.full((rows, full_width, 2, 3), 7, dtype=torch.int16)
        batch.batch["weights"] = torch.full((rows, 6), value)
        batch.batch["baseline"] = torch.full((rows,), value)
    joined = pad_and_concat([first, second], PAD).batch
    assert joined["old_log_probs"].tolist() == [[0.5, 0.5, 0.0, 0.0]] * 2 + [[0.25] * 4]
    assert joined["flags"].tolist() == [[True, True, False, False]] * 2 + [[True] * 4]
    assert joined["weights"].tolist() == [[0.5] * 6] * 2 + [[0.25] * 6]
    assert joined["baseline"].tolist() == [0.5, 0.5, 0.25]
    assert joined["experts"].shape == (3, 7, 2, 3)
    assert joined["experts"].dtype == torch.int16
    assert joined["experts"][:, :, 1, 2].tolist() == [[7] * 5 + [0] * 2] * 2 + [[0] * 2 + [7] * 5]


def test_an_extra_value_that_a_batch_lacks_is_none():
    joined = pad_and_concat([lay_out(sample(1, 1, acc=1.0)), lay_out(sample(1, 1, note="x"))], PAD)
    assert joined.non_tensor_batch["acc"].tolist() == [1.0, None]
    assert joined.non_tensor_batch["note"].tolist() == [None, "x"]


def test_the_input_batches_do_not_change_and_meta_info_is_kept():
    first, second = lay_out(sample(1, 1)), lay_out(sample(2, 3))
    for batch in (first, second):
        batch.meta_info["temperature"] = 0.7
    before = {name: column.clone() for name, column in first.batch.items()}
    joined = pad_and_concat([first, second], PAD)
    assert joined.meta_info == {"temperature": 0.7}
    assert all(torch.equal(first.batch[name], column) for name, column in before.items())


def test_columns_of_other_widths_are_rejected():
    first, second = lay_out(sample(2, 3)), lay_out(sample(2, 4))
    first.batch["odd"], second.batch["odd"] = torch.zeros(1, 8), torch.zeros(1, 9)
    with pytest.raises(ValueError, match=r"column 'odd' has rows of shape \[\(8,\), \(9,\)\].*3 \(responses\) or 5"):
        pad_and_concat([first, second], PAD)
    del second.batch["odd"]
    with pytest.raises(ValueError, match=r"column 'odd'.*None: missing"):
        pad_and_concat([first, second], PAD)
    with pytest.raises(ValueError, match="no batch"):
        pad_and_concat([], PAD)


def test_joined_batches_equal_one_layout_on_random_lengths():
    generator = np.random.default_rng(0)
    for _ in range(30):
        parts = [
            [
                sample(int(p), int(t))
                for p, t in zip(generator.integers(1, 6, n), generator.integers(0, 6, n), strict=True)
            ]
            for n in generator.integers(1, 4, generator.integers(1, 5))
        ]
        joined = pad_and_concat([lay_out(*part) for part in parts], PAD)
        assert isinstance(joined, DataProto)
        assert_same(joined, lay_out(*(one for part in parts for one in part)))
