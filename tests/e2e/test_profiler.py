"""Profiles of a run: traces of the configured steps, ranks and replicas, with the stages inside."""

import gzip
import json

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

ROLES = "actor_rollout_ref__"
STAGES = {"actor_compute_log_prob", "ref_compute_log_prob", "actor_update", "mini_batch0"}


def events(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_run_profiles_the_configured_step_of_a_rank_and_a_replica(tmp_path, ray_address):
    run, profiles = TinyRun(tmp_path, ray_address), tmp_path / "profiles"
    run.run(
        trainer__n_gpus_per_node=2,
        actor_rollout_ref__actor__use_kl_loss=True,
        global_profiler__tool="torch",
        global_profiler__steps="[2]",
        global_profiler__save_path=profiles,
        global_profiler__relocate_results=True,
        **{f"{ROLES}actor__profiler__enable": True, f"{ROLES}actor__profiler__ranks": "[1]"},
        **{f"{ROLES}rollout__profiler__enable": True, f"{ROLES}rollout__profiler__ranks": "[0]"},
    )
    assert sorted(run.metrics()) == [1, 2]
    files = sorted(path for path in profiles.rglob("*") if path.is_file())
    trainer = [path for path in files if path.name.startswith("train_")]
    assert [path.name.partition("_pid")[0] for path in trainer] == ["train_step2_rank1-of-2"]
    names = {event["name"] for event in events(trainer[0])}
    assert names >= STAGES
    engine = [path for path in files if path.name.startswith("rollout-replica")]
    assert engine and all(path.name.startswith("rollout-replica0_step2") for path in engine)
    traces = [path for path in engine if path.name.endswith(".json.gz")]
    assert any(event["name"] == "aten::addmm" or "mm" in event["name"] for event in events(traces[0]))
    assert set(files) == {*trainer, *engine}
