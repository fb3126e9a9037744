"""Metrics under upstream verl's names and arguments; expected values are computed by hand."""

import numpy as np
import pytest
import torch

from verl import DataProto
from verl.trainer.ppo.metric_utils import (
    compute_data_metrics,
    compute_throughout_metrics,
    compute_timing_metrics,
    process_validation_metrics,
    reduce_metrics,
)


def batch(**changes):
    """Three samples with prompts of 2, 1 and 3 tokens and responses of 2, 3 and 0 tokens; the last one is aborted."""
    tensors = {
        "responses": torch.zeros(3, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        # The second token of the second response is a tool's.
        "response_mask": torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]),
        "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [9.0, 0.0, 0.0]]),
        "token_level_rewards": torch.tensor([[-0.5, 1.0, 0.0], [0.0, -0.5, 3.0], [9.0, 0.0, 0.0]]),
        "advantages": torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, -2.0], [99.0, 99.0, 99.0]]),
        "returns": torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 4.0], [99.0, 99.0, 99.0]]),
        "values": torch.tensor([[1.0, 1.0, 99.0], [2.0, 99.0, 2.0], [99.0, 99.0, 99.0]]),
    }
    return DataProto.from_dict(tensors=tensors | changes)


# Samples 1 and 2 have responses; tokens (0, 0), (0, 1), (1, 0) and (1, 2) are the model's.
EXPECTED = {
    "critic/score": (2.0, 3.0, 1.0),
    "critic/rewards": (1.5, 2.5, 0.5),
    "critic/advantages": (1.0, 3.0, -2.0),
    "critic/returns": (2.5, 4.0, 1.0),
    "critic/values": (1.5, 2.0, 1.0),
    "response_length": (5 / 3, 3.0, 0.0),
    "response_length_non_aborted": (2.5, 3.0, 2.0),
    "prompt_length": (2.0, 3.0, 1.0),
}


def test_metrics_of_the_data():
    metrics = compute_data_metrics(batch())
    for prefix, values in EXPECTED.items():
        found = [metrics.pop(f"{prefix}/{statistic}") for statistic in ("mean", "max", "min")]
        assert found == pytest.approx(values), prefix
    # The padded widths of the batch are the limits, 3 tokens each.
    # Returns have the variance 5/3 and the differences 0, 1, 1, 2 to the values have the variance 2/3.
    assert metrics == pytest.approx(
        {
            "response_length/clip_ratio": 1 / 3,
            "response_length_non_aborted/clip_ratio": 1 / 2,
            "prompt_length/clip_ratio": 1 / 3,
            "response/aborted_ratio": 1 / 3,
            "critic/vf_explained_var": 1 - (2 / 3) / (5 / 3 + 1e-5),
        }
    )


def test_metrics_of_a_critic_need_its_values():
    data = batch()
    with_critic, without = compute_data_metrics(data), compute_data_metrics(data, use_critic=False)
    names = {"critic/values/mean", "critic/values/max", "critic/values/min", "critic/vf_explained_var"}
    assert with_critic.keys() - without.keys() == names
    assert without.items() <= with_critic.items()
    assert "values" in data.batch, "the batch is unchanged"
    no_values = data.select(batch_keys=[key for key in data.batch.keys() if key != "values"])  # noqa: SIM118
    assert compute_data_metrics(no_values, use_critic=False) == without
    with pytest.raises(ValueError, match="has no column values; pass use_critic=False"):
        compute_data_metrics(no_values)


def test_seconds_and_milliseconds_per_token():
    metrics = compute_timing_metrics(
        batch(), {"gen": 1.0, "ref": 2.2, "update_actor": 3.3, "reward": 4.0, "step": 11.0}
    )
    # 5 response tokens, 11 tokens with the prompts.
    assert metrics == pytest.approx(
        {
            "timing_s/gen": 1.0,
            "timing_s/ref": 2.2,
            "timing_s/update_actor": 3.3,
            "timing_s/reward": 4.0,
            "timing_s/step": 11.0,
            "timing_per_token_ms/gen": 200.0,
            "timing_per_token_ms/ref": 200.0,
            "timing_per_token_ms/update_actor": 300.0,
        }
    )


def test_tokens_per_second_and_device():
    metrics = compute_throughout_metrics(batch(), {"gen": 1.0, "step": 2.0}, n_gpus=4)
    assert metrics == pytest.approx(
        {"perf/total_num_tokens": 11, "perf/time_per_step": 2.0, "perf/throughput": 11 / (2.0 * 4)}
    )


def test_lists_are_reduced_to_one_number():
    reduced = reduce_metrics({"loss": [1.0, 2.0, 6.0], "grad/max": [1.0, 5.0], "grad/min": [1.0, 5.0]})
    assert reduced == {"loss": 3.0, "grad/max": 5.0, "grad/min": 1.0}


def test_statistics_of_a_validation():
    """Two prompts of one data source, two samples each."""
    nested = process_validation_metrics(["d"] * 4, ["a", "a", "b", "b"], {"reward": [0.0, 1.0, 1.0, 1.0]})
    statistics = nested["d"]["reward"]
    assert statistics["mean@2"] == pytest.approx(0.75) and statistics["std@2"] == pytest.approx(0.25)
    # The larger of two draws with replacement from 0 and 1 is 1 with probability 3/4; 1000 draws are random.
    assert statistics["best@2/mean"] == pytest.approx((0.75 + 1) / 2, abs=0.02)
    assert statistics["worst@2/mean"] == pytest.approx((0.25 + 1) / 2, abs=0.02)
    assert np.isfinite(list(statistics.values())).all()
