import pytest

from verl.config import PPOConfig, load_config
from verl.config.weight_updates import resolve_backend
from verl.preflight.checks.transport import check_transport
from verl.preflight.findings import Findings

R = "actor_rollout_ref__rollout__"
FIELD = "actor_rollout_ref.rollout.checkpoint_engine.backend"


def problems_on(device, run_files, **changes):
    found = Findings()
    check_transport(load_config(run_files.overrides(**changes)), device, found)
    return found.errors


@pytest.mark.parametrize(
    ("device", "backend", "use"),
    [
        ("cpu", "nccl", "use gloo"),
        ("cpu", "hccl", "use gloo"),
        ("cuda", "hccl", "use nccl or gloo"),
    ],
)
def test_a_backend_that_the_device_has_not(run_files, device, backend, use):
    [problem] = problems_on(device, run_files, **{R + "checkpoint_engine__backend": backend})
    assert problem == f"{FIELD}={backend}: does not work on trainer.device={device}; {use}"


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), ("cuda", "nccl"), ("cuda", "gloo"), ("npu", "hccl"), ("npu", "nccl"), ("npu", "gloo")],
)
def test_a_backend_that_the_device_has(run_files, device, backend):
    assert problems_on(device, run_files, **{R + "checkpoint_engine__backend": backend, R + "nnodes": 2}) == []


def test_shared_memory_reaches_one_node(run_files):
    [problem] = problems_on("npu", run_files, **{R + "nnodes": 2})
    assert problem.startswith(f"{FIELD}=naive: ") and "rollout.nnodes=2" in problem and problem.endswith("use hccl")
    assert problems_on("npu", run_files, **{R + "nnodes": 1}) == []


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl"), ("npu", "hccl")])
def test_a_trainer_on_several_nodes_has_the_device_s_own(device, backend):
    config = PPOConfig()
    assert resolve_backend(config, device) == "naive"
    config.trainer.nnodes = 2
    assert resolve_backend(config, device) == backend
    config.actor_rollout_ref.rollout.checkpoint_engine.backend = "gloo"
    assert resolve_backend(config, device) == "gloo"


def test_changes_whatever_they_cost_where_there_can_be_none(run_files):
    delta = {R + "checkpoint_engine__delta": "on"}
    assert (
        problems_on("npu", run_files, **delta)
        == problems_on("cuda", run_files, **delta, **{R + "free_cache_engine": False})
        == []
    )
    [problem] = problems_on("cuda", run_files, **delta)
    assert (
        "checkpoint_engine.delta=on" in problem
        and "free_cache_engine" in problem
        and problem.endswith("use auto or off")
    )


def test_it_is_checked_with_the_rest(problem_of, plan_of):
    assert problem_of(**{R + "checkpoint_engine__backend": "nccl"}).startswith(f"{FIELD}=nccl: ")
    apart = {R + "nnodes": 2, R + "n_gpus_per_node": 2, R + "checkpoint_engine__backend": "gloo"}
    assert plan_of(**apart).replicas == 4


def test_a_node_s_devices_divide_into_replicas(problem_of):
    changes = {R + "nnodes": 2, R + "n_gpus_per_node": 3, R + "tensor_model_parallel_size": 2}
    problem = problem_of(**changes, **{R + "checkpoint_engine__backend": "gloo"})
    assert "n_gpus_per_node=3" in problem and "use 1 or 3" in problem
