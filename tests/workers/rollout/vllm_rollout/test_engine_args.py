"""Start arguments of an engine."""

import pytest

from verl.config import PPOConfig
from verl.workers.rollout.vllm_rollout.engine_args import engine_args


@pytest.mark.parametrize("device", ["cuda", "npu"])
@pytest.mark.parametrize(("size", "executor"), [(1, "uni"), (4, "mp")])
def test_ray_never_runs_the_workers(device, size, executor):
    """vLLM would choose Ray in the trainer's placement group, and wait there for devices that the trainer has."""
    roles = PPOConfig().actor_rollout_ref
    roles.rollout.tensor_model_parallel_size, roles.model.path = size, "model"
    caps = {"prompt_length": 8, "response_length": 8, "seed": 0}
    arguments = engine_args(roles.rollout, roles.model, device=device, dtype="bfloat16", **caps)
    assert (arguments["tensor_parallel_size"], arguments["distributed_executor_backend"]) == (size, executor)
    roles.rollout.engine_kwargs = {"vllm": {"distributed_executor_backend": "external_launcher"}}
    arguments = engine_args(roles.rollout, roles.model, device=device, dtype="bfloat16", **caps)
    assert arguments["distributed_executor_backend"] == "external_launcher"
