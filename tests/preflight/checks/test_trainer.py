import importlib.util
import os
import re

import pytest

from fixtures.tiny import write_tiny_classifier
from verl.config import load_config
from verl.preflight.checks import trainer as trainer_checks
from verl.preflight.checks.trainer import check_environment, check_rollout_lag
from verl.preflight.findings import Findings
from verl.preflight.target import HARDWARE

LAG = "trainer__rollout_lag"
NNODES = "actor_rollout_ref__rollout__nnodes"
ROLLOUT = "actor_rollout_ref.rollout"
ADDITIONAL = f"{ROLLOUT}.engine_kwargs.vllm.additional_config"
STANDALONE = {f"{ROLLOUT}.nnodes": 1, f"{ROLLOUT}.checkpoint_engine.backend": "hccl"}


# ---- devices and nodes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_missing_device_is_an_error(problem_of, device, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert problem_of(trainer__device=device).startswith(f"trainer.device={device}: ")


def test_devices_left_for_other_models_are_counted(problem_of, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("verl.preflight.checks.trainer.detect_device", lambda device: "cuda")
    monkeypatch.setattr("verl.preflight.checks.trainer.count_devices", lambda device: 2)
    model = "reward__reward_model__"
    problem = problem_of(
        **{f"{model}enable": True, f"{model}enable_resource_pool": True, f"{model}nnodes": 1},
        **{f"{model}model_path": write_tiny_classifier(tmp_path / "classifier"), f"{model}n_gpus_per_node": 2},
        **{f"{model}rollout__max_model_len": 64, "reward__custom_reward_function__path": "null"},
    )
    assert "the reward model needs 2 devices, and 1 of the 2 cuda device(s) of this machine are left" in problem


def test_several_nodes_need_a_ray_cluster(problem_of, plan_of, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    several = {"trainer__nnodes": 2}
    assert problem_of(**several).startswith("trainer.nnodes=2: this machine is only one node")
    plan_of(**several, ray_kwargs__ray_init="{address: auto}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    plan_of(**several)


def test_more_ranks_than_cores_are_a_warning(plan_of):
    ranks = 1 << (len(os.sched_getaffinity(0))).bit_length()
    changes = {"data__train_batch_size": 2 * ranks, "actor_rollout_ref__actor__ppo_mini_batch_size": ranks}
    if 2 * ranks > 40:
        pytest.skip("more cores than the data has prompts")
    plan = plan_of(**changes, trainer__n_gpus_per_node=ranks)
    assert any(f"trainer.n_gpus_per_node={ranks}" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("keys", "nodes", "kind", "words"),
    [
        ({}, 1, None, None),
        ({}, 3, "warnings", "set actor_rollout_ref.rollout.nnodes=2"),
        (STANDALONE, 2, None, None),
        (STANDALONE, 1, "errors", "use --nodes 2"),
        (STANDALONE | {f"{ROLLOUT}.checkpoint_engine.backend": "naive"}, 1, None, None),
        (STANDALONE | {f"{ROLLOUT}.nnodes": 3}, 8, "warnings", "set actor_rollout_ref.rollout.nnodes=7"),
        ({"trainer.nnodes": 2}, 2, None, None),
        ({"distillation.enabled": True, "distillation.nnodes": 1}, 2, None, None),
        ({"trainer.nnodes": 2}, 1, "errors", "or lower trainer.nnodes"),
        ({"trainer.nnodes": 2}, 4, "warnings", "or trainer.nnodes=4"),
    ],
)
def test_planned_nodes_are_compared_with_the_config(examine_on, keys, nodes, kind, words):
    _, found = examine_on(keys=keys, nodes=nodes)
    about = {name: [text for text in getattr(found, name) if "--nodes" in text] for name in ("errors", "warnings")}
    assert {name for name, texts in about.items() if texts} == ({kind} if kind else set())
    assert kind is None or words in about[kind][0]


def test_a_planned_run_on_several_nodes_has_a_note_about_ray(examine_on):
    _, found = examine_on(keys={"trainer.nnodes": 2})
    assert any("needs 2 nodes: start it in a Ray cluster" in text for text in found.notes)
    _, apart = examine_on(keys=STANDALONE)
    assert any(re.search(r"needs 2 nodes \(or 1 with \d+ devices\): start it", text) for text in apart.notes)
    for keys in ({}, {"trainer.nnodes": 2, "ray_kwargs.ray_init.address": "auto"}):
        assert not any("Ray cluster" in text for text in examine_on(keys=keys)[1].notes)


@pytest.mark.parametrize("name", [name for name in HARDWARE if name != "cpu"])
def test_the_planned_hardware_decides_about_the_device(examine_on, name):
    quantization = "ascend" if name.startswith("npu") else "fp8"
    keys = {f"{ROLLOUT}.quantization": quantization, "trainer.device": "auto", f"{ROLLOUT}.gpu_memory_utilization": 0.4}
    plan, found = examine_on(keys=keys, name=name)
    assert found.errors == [] and plan.device == name.partition(":")[0]
    _, found = examine_on(keys={**keys, "trainer.device": "cpu"}, name=name)
    assert any(f"set trainer.device={name.partition(':')[0]}" in text for text in found.errors)


# ---- generation ahead -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_rollout_lag_on_an_accelerator_needs_separate_devices(run_files, device):
    def errors(**changes):
        found = Findings()
        check_rollout_lag(load_config(run_files.overrides(**changes)), device, found)
        return found.errors

    (error,) = errors(**{LAG: 1})
    assert all(
        words in error
        for words in ("trainer.rollout_lag=1", "rollout.nnodes=0", "rollout.nnodes=1", "use trainer.rollout_lag=0")
    )
    assert errors(**{LAG: 1, NNODES: 1}) == [] and errors(**{LAG: 0}) == []


def test_rollout_lag_on_a_cpu_allows_any_placement(plan_of):
    """Does not raise."""
    for nnodes in (0, 1):
        plan_of(**{LAG: 1, NNODES: nnodes, "actor_rollout_ref__rollout__n_gpus_per_node": 1})


def test_invalid_rollout_lag_is_an_error(problem_of):
    assert "trainer.rollout_lag=2" in problem_of(**{LAG: 2})
    partial = {"actor_rollout_ref__rollout__partial_rollout": True, "data__gen_batch_size": 12}
    assert "use one of the two" in problem_of(**{LAG: 1}, **partial)


def test_rollout_lag_without_correction_is_a_warning(plan_of):
    def warnings(**changes):
        return [text for text in plan_of(**changes).warnings if "older weights" in text]

    (warning,) = warnings(**{LAG: 1})
    assert "trainer.rollout_lag=1" in warning and "rollout_is=token" in warning
    assert not warnings(**{LAG: 1}, algorithm__rollout_correction__rollout_is="token")
    assert not warnings(**{LAG: 1}, algorithm__rollout_correction__bypass_mode=True)
    assert not warnings()


def test_free_cache_engine_is_unused_on_separate_devices(plan_of):
    free = {"actor_rollout_ref__rollout__free_cache_engine": False}
    apart = {NNODES: 1, "actor_rollout_ref__rollout__n_gpus_per_node": 1}
    unused = "with rollout.nnodes=1, because the replicas have their own memory: "
    assert any(unused in note and "free_cache_engine" in note for note in plan_of(**free, **apart).notes)
    assert not any(unused in note for note in (*plan_of(**free).notes, *plan_of(**apart).notes))


# ---- critic warm-up -------------------------------------------------------------------------------------------------


def test_a_warmup_without_a_critic_is_an_error(problem_of):
    problem = problem_of(trainer__critic_warmup=2)
    words = ("trainer.critic_warmup=2", "no critic", "adv_estimator=grpo", "leave it out")
    assert all(word in problem for word in words), problem


def test_a_warmup_as_long_as_the_run_is_a_warning(plan_of, run_files):
    changes = {"critic__enable": True, "trainer__critic_warmup": 3, "trainer__total_training_steps": 3}
    plan = plan_of(critic__model__path=run_files.model, **changes)
    assert any(all(word in warning for word in ("critic_warmup=3", "never trained")) for warning in plan.warnings)


# ---- loggers and directories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "install"), [("wandb", "verl[wandb]"), ("swanlab", "verl[swanlab]")])
def test_a_logger_without_its_package_is_an_error(problem_of, monkeypatch, name, install):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else find_spec(package))
    text = problem_of(trainer__logger=f"[console,{name}]")
    assert text.startswith("trainer.logger: ") and install in text


def test_a_directory_that_cannot_be_written_is_an_error(problem_of, run_files):
    text = problem_of(trainer__default_local_dir=run_files.reward / "below")
    assert "trainer.default_local_dir=" in text and "is not a directory" in text
    assert "trainer.rollout_data_dir=" in problem_of(trainer__rollout_data_dir=run_files.reward)


def test_a_timeline_that_cannot_be_written_is_an_error(problem_of, plan_of, run_files):
    assert "trainer.timeline=" in problem_of(trainer__timeline=run_files.reward / "trace.json")
    assert "is a directory" in problem_of(trainer__timeline=run_files.root)
    plan_of(trainer__timeline=run_files.root / "new" / "trace.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_an_error(problem_of, run_files):
    closed = run_files.root / "closed"
    closed.mkdir(mode=0o500)
    assert "is not writable" in problem_of(trainer__default_local_dir=closed / "out")


def test_the_checkpoint_to_resume_from_must_exist(problem_of, problems_of, run_files):
    mode = {"trainer__resume_mode": "resume_path"}
    assert "trainer.resume_from_path is not set" in problem_of(**mode)
    assert "no such directory" in problem_of(**mode, trainer__resume_from_path=run_files.root / "global_step_3")
    assert "is not a global_step_N directory" in problem_of(**mode, trainer__resume_from_path=run_files.model)
    (run_files.root / "global_step_3").mkdir()
    problems = problems_of(**mode, trainer__resume_from_path=run_files.root / "global_step_3")
    assert "has no data.pt" in problems[0] and "has no model" in problems[1]


def test_checkpoints_without_contents_are_an_error(problem_of, problems_of, plan_of, run_files):
    actor = {"actor_rollout_ref__actor__checkpoint__save_contents": "[]"}
    critic = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    both = actor | critic | {"critic__checkpoint__save_contents": "[]"}
    problem = problem_of(**actor, trainer__save_freq=5)
    assert problem.startswith("actor_rollout_ref.actor.checkpoint.save_contents=[]: ") and "save_freq=5" in problem
    starts = [problem.split("=")[0] for problem in problems_of(**both, trainer__save_freq=5)]
    assert starts == [f"{role}.checkpoint.save_contents" for role in ("actor_rollout_ref.actor", "critic")]
    plan_of(**both)


# ---- settings of an engine on an NPU --------------------------------------------------------------------------------


def npu_findings(monkeypatch, release, additional, environment=()):
    monkeypatch.setattr(trainer_checks, "installed_vllm_ascend", lambda: release)
    config = load_config([])
    config.actor_rollout_ref.rollout.engine_kwargs = {"vllm": {"additional_config": additional}}
    found = Findings()
    check_environment(config, "npu", dict(environment), found)
    return found


@pytest.mark.parametrize("release", [None, "0.26.0rc1", "0.30.0rc2"])
@pytest.mark.parametrize("key", ["weight_nz_mode", "enable_fused_mc2"])
def test_engine_arguments_that_prevent_updates_are_errors_before_the_start(monkeypatch, release, key):
    assert npu_findings(monkeypatch, release, {key: 0}).errors == []
    (error,) = npu_findings(monkeypatch, release, {key: 1}).errors
    assert error.startswith(f"{ADDITIONAL}.{key}=1: ") and "use 0, or remove the key" in error


def test_variables_that_the_release_does_not_read_are_no_errors(monkeypatch):
    variables = {"VLLM_ASCEND_ENABLE_NZ": "1"}
    assert npu_findings(monkeypatch, "0.30.0rc2", {}, variables).errors == []
    (error,) = npu_findings(monkeypatch, "0.26.0rc1", {}, variables).errors
    assert "set VLLM_ASCEND_ENABLE_NZ=0" in error


def test_release_that_was_not_tested_is_a_warning(monkeypatch):
    assert npu_findings(monkeypatch, "0.30.0rc2", {}).warnings == []
    (warning,) = npu_findings(monkeypatch, "0.31.0", {}).warnings
    assert "vllm-ascend 0.31.0 is newer than the newest release tested with verl, 0.30.0rc2" in warning


def test_workers_cannot_start_through_uv(problem_of, plan_of):
    text = problem_of(ray_kwargs__ray_init="{runtime_env: {py_executable: uv -v run --frozen}}")
    assert text.startswith("ray_kwargs.ray_init.runtime_env.py_executable=uv -v run") and "VERL_USE_UV=0" in text
    plan_of(ray_kwargs__ray_init="{runtime_env: {py_executable: null}}")
