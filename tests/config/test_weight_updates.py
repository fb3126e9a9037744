import pytest

from verl.config import PPOConfig, RolloutConfig
from verl.config.rollout import CheckpointEngineConfig
from verl.config.weight_updates import full_update_reason, resolve_backend


def test_reasons_for_full_updates():
    def why(device, delta="auto", **rollout):
        return full_update_reason(
            RolloutConfig(checkpoint_engine=CheckpointEngineConfig(delta=delta), **rollout), device
        )

    assert why("cpu") is why("npu") is why("cpu", quantization="ascend") is None
    assert why("cuda", free_cache_engine=False) is why("cpu", quantization_side="receiver") is None
    assert "frees its weights" in why("cuda")
    assert "quantization_side=receiver" in why("cpu", quantization="ascend", quantization_side="receiver")
    assert "delta=off" in why("npu", delta="off")


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl"), ("npu", "hccl")])
def test_a_trainer_on_several_nodes_replaces_naive_by_the_backend_of_its_device(device, backend):
    config = PPOConfig()
    assert resolve_backend(config, device) == "naive"
    config.trainer.nnodes = 2
    assert resolve_backend(config, device) == backend
    config.actor_rollout_ref.rollout.checkpoint_engine.backend = "gloo"
    assert resolve_backend(config, device) == "gloo"
