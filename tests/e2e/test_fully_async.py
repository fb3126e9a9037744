"""Fully asynchronous runs: the replicas generate while the trainer works, within the bound of the staleness."""

from collections import Counter

import pytest

from fixtures.training import TinyRun, prompts_of

pytestmark = pytest.mark.e2e

STEPS = 16
# Two local updates of four prompts in a step; half a step is generated ahead.
SETTINGS = dict(
    actor_rollout_ref__hybrid_engine=False,
    actor_rollout_ref__rollout__checkpoint_engine__backend="naive",
    data__train_batch_size=0,
    data__gen_batch_size=1,
    rollout__nnodes=1,
    rollout__n_gpus_per_node=1,
    async_training__staleness_threshold=0.5,
    async_training__trigger_parameter_sync_step=2,
    async_training__require_batches=1,
    trainer__total_training_steps=None,
)
MODULE = "verl.experimental.fully_async_policy.fully_async_main"


def total(steps):
    """Samples of each prompt over all steps."""
    return sum((Counter(prompts) for prompts in steps.values()), Counter())


def test_a_run_learns_within_the_staleness_and_loses_no_prompt_when_killed(tmp_path):
    run = TinyRun(tmp_path, module=MODULE)
    settings = dict(
        SETTINGS,
        rollout__total_rollout_steps=8 * STEPS + 3,
        async_training__partial_rollout=True,
        async_training__concurrent_samples_per_replica=4,
        trainer__save_freq=1,
        trainer__max_actor_ckpt_to_keep=1,
        trainer__rollout_data_dir=tmp_path / "dumps",
        actor_rollout_ref__actor__optim__lr=5e-3,
    )
    saved = run.killed_after(3, **settings)
    assert 3 <= saved < STEPS - 1, "killed too late to have prompts in progress"
    run.run(**settings)

    metrics = run.metrics()
    assert sorted(metrics) == list(range(1, STEPS + 1)), "a run of 131 prompts has 16 steps of 8"
    assert total(prompts_of(tmp_path / "dumps")) == total(run.expected_prompts(STEPS))
    behind = [metrics[step]["training/versions_behind/max"] for step in range(1, STEPS + 1)]
    assert max(behind) == 1 and behind[0] == behind[saved] == 0, "at most one version, none after a start"
    stale = [metrics[step]["fully_async/count/stale_trajectory_processed"] for step in range(saved + 1, STEPS + 1)]
    assert stale[0] == 0 and stale[-1] > 0 and stale == sorted(stale)
    for step, values in metrics.items():
        assert values["fully_async/count/current_param_version"] == step - 1
        assert values["fully_async/count/staleness_samples"] <= 4
        assert 0 <= values["fully_async/rollouter/idle_ratio"] <= 1 and values["fully_async/trainer/idle_ratio"] <= 1
    assert metrics[STEPS]["fully_async/count/staleness_samples"] == 0
    scores = [metrics[step]["critic/score/mean"] for step in range(1, STEPS + 1)]
    assert sum(scores[-4:]) > 1.5 * sum(scores[:4]), scores


def test_without_partial_rollouts_every_response_has_one_version(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address, module=MODULE)
    run.run(
        **SETTINGS,
        rollout__total_rollout_steps=24,
        async_training__partial_rollout=False,
        async_training__concurrent_samples_per_replica=2,
        algorithm__rollout_correction__bypass_mode=False,
        algorithm__rollout_correction__rollout_is="token",
        trainer__rollout_data_dir=tmp_path / "dumps",
    )
    metrics = run.metrics()
    assert sorted(metrics) == [1, 2, 3]
    assert total(prompts_of(tmp_path / "dumps")) == total(run.expected_prompts(3))
    assert all(metrics[step]["fully_async/partial/total_partial_num"] == 0 for step in metrics)
    assert [metrics[step]["training/versions_behind/max"] for step in (1, 2, 3)] == [0, 1, 1]
    assert all("rollout_corr/kl" in metrics[step] for step in metrics)
