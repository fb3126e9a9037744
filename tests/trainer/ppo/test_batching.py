"""Division of a batch among ranks."""

import numpy as np
import pytest
import torch

from fixtures.engine_cases import make_batch
from fixtures.mask_cases import with_sampling_masks
from verl.protocol import DataProto
from verl.trainer.ppo.batching import CRITIC_COLUMNS, POLICY_COLUMNS, split_even, split_mini_batches


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("balance", [True, False])
def test_mini_batches_do_not_depend_on_the_ranks(dp_size, balance):
    data = make_batch(13)
    data.batch["row"] = torch.arange(13).unsqueeze(1)
    data.batch["advantages"] = torch.arange(13.0).unsqueeze(1).expand(13, 7)
    ranks = split_mini_batches(data, 6, dp_size, balance=balance)
    assert len(ranks) == dp_size
    for number, expected in enumerate([range(6), range(6, 12), range(12, 13)]):
        shards = [rank[number] for rank in ranks]
        rows = [int(v) for shard in shards for v in shard.batch["advantages"][:, 0]]
        assert sorted(rows) == list(expected)
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        mask = data.batch["response_mask"][list(expected)]
        for shard in shards:
            assert shard.meta_info["batch_num_tokens"] == int(mask.sum())
            assert shard.meta_info["global_batch_size"] == sum(1 for row in mask.tolist() if any(row))
            assert shard.meta_info["loss_scale_factor"] == 7
            assert shard.meta_info["temperature"] == 0.8
            assert shard.meta_info["global_step"] == 7
            assert [shard.non_tensor_batch["uid"].tolist()] == [
                [f"prompt-{int(v) // 2}" for v in shard.batch["advantages"][:, 0]]
            ]


def test_a_shard_has_only_the_columns_of_the_update():
    shard = split_mini_batches(make_batch(4), 4, 1)[0][0]
    assert set(shard.batch.keys()) == {
        "input_ids",
        "attention_mask",
        "responses",
        "response_mask",
        "old_log_probs",
        "ref_log_prob",
        "advantages",
        "sample_index",
    }
    assert set(shard.non_tensor_batch) == {"uid"}


def test_sampling_masks_go_to_the_policy_only():
    data = with_sampling_masks(make_batch(12), vocab_size=80)
    masks = data.non_tensor_batch["sampling_masks"]
    shards, _ = split_even(data, 2, columns=POLICY_COLUMNS)
    for shard in (*shards, *(part for rank in split_mini_batches(data, 6, 2) for part in rank)):
        rows = [data.batch["input_ids"].tolist().index(ids) for ids in shard.batch["input_ids"].tolist()]
        assert shard.non_tensor_batch["sampling_masks"].tolist() == [masks[row] for row in rows]
    without = [*split_even(data, 2)[0], *split_mini_batches(data, 12, 1, columns=CRITIC_COLUMNS)[0]]
    assert all(set(shard.non_tensor_batch) == {"uid"} for shard in without)


def test_sample_index_is_the_index_in_the_batch():
    data = make_batch(12)
    for rank in split_mini_batches(data, 6, 2):
        for shard in rank:
            index = shard.batch["sample_index"]
            assert torch.equal(shard.batch["input_ids"], data.batch["input_ids"][index])


def test_balancing_gives_ranks_the_same_number_of_tokens():
    data = make_batch(64, prompt_width=60, seed=3)
    order = torch.argsort(data.batch["attention_mask"].sum(1))
    data = data[order.numpy()]

    def spread(balance):
        ranks = split_mini_batches(data, 64, 2, balance=balance)
        tokens = [int(rank[0].batch["attention_mask"].sum()) for rank in ranks]
        return max(tokens) - min(tokens)

    assert spread(True) <= 2
    assert spread(False) > 500


@pytest.mark.parametrize("dp_size", [1, 2, 3, 16])
@pytest.mark.parametrize("balance", [True, False])
def test_the_inverse_order_undoes_split_even(dp_size, balance):
    data = make_batch(13)
    shards, inverse = split_even(data, dp_size, balance)
    assert len(shards) == dp_size
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    back = DataProto.concat(shards)[inverse]
    assert torch.equal(back.batch["input_ids"], data.batch["input_ids"])
    assert np.array_equal(back.non_tensor_batch["uid"], data.non_tensor_batch["uid"])


def test_shards_have_the_loss_scale_factor():
    shards = split_mini_batches(make_batch(4), 4, 2, loss_scale_factor=512.0)
    assert [rank[0].meta_info["loss_scale_factor"] for rank in shards] == [512.0, 512.0]


def test_a_mini_batch_size_of_zero_is_rejected():
    with pytest.raises(ValueError, match="mini_batch_size_samples=0"):
        split_mini_batches(make_batch(4), 0, 1)


def test_given_parts_are_the_rows_of_the_shards():
    data = make_batch(5)
    parts = [np.array([4, 1]), np.array([], dtype=np.int64), np.array([0, 3, 2])]
    shards, inverse = split_even(data, 3, parts=parts)
    for shard, rows in zip(shards, parts, strict=True):
        assert torch.equal(shard.batch["input_ids"], data.batch["input_ids"][rows])
    assert torch.equal(DataProto.concat(shards)[inverse].batch["input_ids"], data.batch["input_ids"])
