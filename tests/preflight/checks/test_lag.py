"""Generating ahead: where the engine has to have memory of its own, what it does not go with, what corrects."""

import pytest

from verl.config import load_config
from verl.config.errors import ConfigError
from verl.preflight.checks.lag import check_lag
from verl.preflight.findings import Findings

LAG = "trainer__rollout_lag"
NNODES = "actor_rollout_ref__rollout__nnodes"


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_on_an_accelerator_replicas_need_devices_of_their_own(run_files, device):
    def errors(**changes):
        found = Findings()
        check_lag(load_config(run_files.overrides(**changes)), device, found)
        return found.errors

    (error,) = errors(**{LAG: 1})
    assert all(
        words in error
        for words in ("trainer.rollout_lag=1", "rollout.nnodes=0", "rollout.nnodes=1", "use trainer.rollout_lag=0")
    )
    assert errors(**{LAG: 1, NNODES: 1}) == [] and errors(**{LAG: 0}) == []


def test_on_a_cpu_it_goes_with_any_placement(plan_of):
    for nnodes in (0, 1):
        plan_of(**{LAG: 1, NNODES: nnodes, "actor_rollout_ref__rollout__n_gpus_per_node": 1})


def test_what_cannot_work(problem_of):
    assert "trainer.rollout_lag=2" in problem_of(**{LAG: 2})
    partial = {"actor_rollout_ref__rollout__partial_rollout": True, "data__gen_batch_size": 12}
    assert "use one of the two" in problem_of(**{LAG: 1}, **partial)


def test_older_tokens_ask_for_a_correction(plan_of):
    def warnings(**changes):
        return [text for text in plan_of(**changes).warnings if "older weights" in text]

    (warning,) = warnings(**{LAG: 1})
    assert "trainer.rollout_lag=1" in warning and "rollout_is=token" in warning
    assert not warnings(**{LAG: 1}, algorithm__rollout_correction__rollout_is="token")
    assert not warnings(**{LAG: 1}, algorithm__rollout_correction__bypass_mode=True)
    assert not warnings()


def test_replicas_with_devices_of_their_own_do_not_sleep(plan_of):
    free = {"actor_rollout_ref__rollout__free_cache_engine": False}
    apart = {NNODES: 1, "actor_rollout_ref__rollout__n_gpus_per_node": 1}
    idle = "with rollout.nnodes, where replicas have memory of their own: "
    assert any(idle in note and "free_cache_engine" in note for note in plan_of(**free, **apart).notes)
    assert not any(idle in note for note in (*plan_of(**free).notes, *plan_of(**apart).notes))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.nnodes=1", ("trainer.rollout_lag=1", "actor_rollout_ref.rollout")),
        ("async_training.staleness_threshold=0.1", ("trainer.rollout_lag=1", "partial_rollout=True")),
    ],
)
def test_verls_keys_name_ours(run_files, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config([*run_files.overrides(), override])
    (problem,) = caught.value.problems
    assert all(word in problem for word in words), problem


def test_verls_kinds_of_loop_name_ours(problem_of):
    for mode in ("separate_async", "colocate_async"):
        assert "trainer.rollout_lag=1" in problem_of(trainer__v1__trainer_mode=mode)
