import importlib.util
import os
import socket

import pytest

from verl.preflight import derive_plan

SERVER = "actor_rollout_ref__rollout__server__"


@pytest.fixture
def used_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use(problem_of, plan_of, used_port):
    changes = {SERVER + "enable_http": True, SERVER + "port": used_port}
    text = problem_of(**changes)
    assert f"actor_rollout_ref.rollout.server.port={used_port}" in text and "is in use" in text
    plan_of(**(changes | {SERVER + "enable_http": False}))
    plan_of(**(changes | {SERVER + "port": 0}))


def test_each_replica_s_port_is_tried(problem_of, used_port):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "port": used_port - 1, "trainer__n_gpus_per_node": 2})
    assert f"port {used_port} on 127.0.0.1 is in use" in text and "replica 1" in text


def test_ports_beyond_the_last(problem_of):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "port": 65535, "trainer__n_gpus_per_node": 2})
    assert "65536" in text and "at most 65534" in text


def test_an_endpoint_that_other_nodes_do_not_reach(plan_of, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    several = {SERVER + "enable_http": True, "trainer__nnodes": 2}
    assert any("server.host=127.0.0.1: each replica" in text for text in plan_of(**several).warnings)
    assert not any("server.host" in text for text in plan_of(**several, **{SERVER + "host": "0.0.0.0"}).warnings)
    assert not any("server.host" in text for text in plan_of(**{SERVER + "enable_http": True}).warnings)


def test_several_nodes_are_a_cluster_s(problem_of, plan_of, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    several = {"trainer__nnodes": 2}
    assert problem_of(**several).startswith("trainer.nnodes=2: this machine alone is one node")
    plan_of(**several, ray_kwargs__ray_init="{address: auto}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    plan_of(**several)


def test_an_address_that_is_not_of_this_host(problem_of):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "host": "203.0.113.7"})
    assert "server.host=203.0.113.7" in text


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_is_not_there(problem_of, device, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert problem_of(trainer__device=device).startswith(f"trainer.device={device}: ")


@pytest.mark.parametrize(("name", "install"), [("wandb", "verl[wandb]"), ("swanlab", "verl[swanlab]")])
def test_a_logger_whose_package_is_missing(problem_of, monkeypatch, name, install):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else find_spec(package))
    text = problem_of(trainer__logger=f"[console,{name}]")
    assert text.startswith("trainer.logger: ") and install in text


def test_directories_that_cannot_be_written(problem_of, run_files):
    text = problem_of(trainer__default_local_dir=run_files.reward / "below")
    assert "trainer.default_local_dir=" in text and "is not a directory" in text
    assert "trainer.rollout_data_dir=" in problem_of(trainer__rollout_data_dir=run_files.reward)


def test_a_timeline_that_cannot_be_written(problem_of, plan_of, run_files):
    assert "trainer.timeline=" in problem_of(trainer__timeline=run_files.reward / "trace.json")
    assert "is a directory" in problem_of(trainer__timeline=run_files.root)
    plan_of(trainer__timeline=run_files.root / "new" / "trace.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(problem_of, run_files):
    closed = run_files.root / "closed"
    closed.mkdir(mode=0o500)
    assert "is not writable" in problem_of(trainer__default_local_dir=closed / "out")


def test_the_checkpoint_to_go_on_from(problem_of, plan_of, run_files):
    mode = {"trainer__resume_mode": "resume_path"}
    assert "trainer.resume_from_path is not set" in problem_of(**mode)
    assert "no such directory" in problem_of(**mode, trainer__resume_from_path=run_files.root / "global_step_3")
    assert "is not a global_step_N directory" in problem_of(**mode, trainer__resume_from_path=run_files.model)
    (run_files.root / "global_step_3").mkdir()
    plan_of(**mode, trainer__resume_from_path=run_files.root / "global_step_3")


def test_too_little_memory_is_a_warning(plan_of, monkeypatch):
    monkeypatch.setattr(derive_plan, "available_memory_bytes", lambda: 1 << 30)
    (warning,) = plan_of().warnings
    assert "1.0 GiB are available" in warning
    monkeypatch.setattr(derive_plan, "available_memory_bytes", lambda: None)
    assert plan_of().warnings == []


def test_more_ranks_than_cores_is_a_warning(plan_of):
    ranks = 1 << (len(os.sched_getaffinity(0))).bit_length()
    changes = {"data__train_batch_size": 2 * ranks, "actor_rollout_ref__actor__ppo_mini_batch_size": ranks}
    if 2 * ranks > 40:
        pytest.skip("more cores than the data has prompts")
    plan = plan_of(**changes, trainer__n_gpus_per_node=ranks)
    assert any(f"trainer.n_gpus_per_node={ranks}" in warning for warning in plan.warnings)
