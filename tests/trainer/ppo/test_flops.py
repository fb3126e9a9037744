"""FLOPs of a model against the counter of torch, and the fraction of the peak."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fixtures.tiny import tiny_config, write_tiny_model
from verl.config import CriticConfig, PPOConfig
from verl.protocol import DataProto
from verl.trainer.ppo.flops import Utilization, model_flops

LENGTHS = torch.tensor([7, 12])


def counted(kind, tied):
    """FLOPs of a forward pass over a sequence of 12 tokens as torch counts them, with a head for every token."""
    # The counter knows no grouped products.
    experts = {"experts_implementation": "eager"} if kind.endswith("moe") else {}
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied), attn_implementation="eager", **experts)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(12)[None] % 100, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("llama", False), ("qwen3_moe", False)])
def test_flops_are_those_that_torch_counts(tmp_path, kind, tied):
    path = write_tiny_model(tmp_path, kind=kind, tied=tied)
    flops = model_flops(path, {}, max_length=512, values=False)
    # Eager attention computes all pairs of tokens.
    pairs = 12 * 12 - 12 * 13 // 2
    assert flops.count(torch.tensor([12]), 12) + flops.per_pair * pairs == counted(kind, tied)
    critic = model_flops(path, {}, max_length=512, values=True)
    assert (critic.per_token, critic.per_pair, critic.head) == (flops.per_token, flops.per_pair, 2 * 64)
    deeper = model_flops(path, {"num_hidden_layers": 4}, max_length=512, values=False)
    assert deeper.per_token == 2 * flops.per_token


def test_unknown_architectures_and_short_windows_have_no_count(tmp_path):
    path = write_tiny_model(tmp_path / "a", kind="glm4_moe")
    assert model_flops(path, {}, max_length=512, values=False) is None
    path = write_tiny_model(tmp_path / "b")
    window = {"sliding_window": 100, "use_sliding_window": True}
    assert model_flops(path, window, max_length=101, values=False) is None
    assert model_flops(path, window, max_length=100, values=False) is not None
    assert model_flops(path, window | {"use_sliding_window": False}, max_length=101, values=False) is not None


@pytest.fixture
def run(tmp_path):
    """Config of two devices with a policy and a critic."""
    config, critic = PPOConfig(), CriticConfig()
    config.trainer.n_gpus_per_node, config.trainer.nnodes = 2, 1
    config.actor_rollout_ref.model.path = critic.model.path = str(write_tiny_model(tmp_path))
    critic.ppo_epochs = 2
    return config, critic


def batch_of():
    mask = (torch.arange(16) < LENGTHS[:, None]).long()
    response = torch.zeros(2, 8, dtype=torch.long)
    response[0, :3] = response[1, :5] = 1
    return DataProto.from_dict(tensors={"attention_mask": mask, "response_mask": response})


def test_utilization_is_the_fraction_of_the_peak_of_all_devices(run):
    config, critic = run
    timing = {"update_actor": 2.0, "old_log_prob": 0.5, "update_critic": 4.0}
    policy = model_flops(config.actor_rollout_ref.model.path, {}, max_length=512, values=False)
    pairs = 7 * 8 // 2 + 12 * 13 // 2
    forward = policy.per_token * 19 + policy.head * 8 + policy.per_pair * pairs
    values = policy.per_token * 19 + 2 * 64 * 8 + policy.per_pair * pairs
    expected = {
        "perf/mfu/actor": 3 * forward / (2.0 * 2e6),
        "perf/mfu/actor_infer": forward / (0.5 * 2e6),
        "perf/mfu/critic": 2 * 3 * values / (4.0 * 2e6),
    }
    found = Utilization(config, critic, 10**6, compute_dtype="bfloat16", infers=True).metrics(batch_of(), timing)
    assert found == pytest.approx(expected, rel=1e-12)
    config.actor_rollout_ref.model.lora_rank = 8
    found = Utilization(config, None, 10**6, compute_dtype="bfloat16", infers=False).metrics(batch_of(), timing)
    frozen = 2 * forward + policy.per_pair * pairs
    assert found == pytest.approx({"perf/mfu/actor": frozen / (2.0 * 2e6)}, rel=1e-12)


def test_without_peak_dtype_or_stage_there_is_no_metric(run):
    config, critic = run
    timing = {"update_actor": 2.0}
    assert not Utilization(config, critic, None, compute_dtype="bfloat16", infers=True).metrics(batch_of(), timing)
    assert not Utilization(config, critic, 10**6, compute_dtype="float32", infers=True).metrics(batch_of(), timing)
    known = Utilization(config, critic, 10**6, compute_dtype="bfloat16", infers=True)
    assert known.metrics(batch_of(), timing).keys() == {"perf/mfu/actor"} and known.metrics(batch_of(), {}) == {}
