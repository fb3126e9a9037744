"""One step of lag: the run generates a batch while it trains on the batch before."""

import pytest

from fixtures.training import TinyRun, prompts_of

pytestmark = pytest.mark.e2e

STEPS = 20


@pytest.mark.smoke
def test_a_run_learns_one_version_behind_and_resumes_with_the_next_prompts_when_killed(tmp_path):
    run = TinyRun(tmp_path, module="verl.experimental.one_step_off_policy.main_ppo")
    settings = dict(
        actor_rollout_ref__hybrid_engine=False,
        rollout__nnodes=1,
        rollout__n_gpus_per_node=1,
        actor_rollout_ref__rollout__checkpoint_engine__backend="naive",
        algorithm__rollout_correction__bypass_mode=False,
        trainer__total_training_steps=STEPS,
        trainer__save_freq=1,
        trainer__max_actor_ckpt_to_keep=1,
        trainer__rollout_data_dir=tmp_path / "dumps",
        algorithm__rollout_correction__rollout_is="token",
        actor_rollout_ref__actor__optim__lr=5e-3,
        # Eight samples at a time go through the forward pass, while others are generated.
        actor_rollout_ref__actor__use_dynamic_bsz=False,
        actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu=8,
    )
    saved = run.killed_after(3, **settings)
    assert 3 <= saved < STEPS - 1, "killed too late to have a batch in flight"
    run.run(**settings)

    metrics = run.metrics()
    assert sorted(metrics) == list(range(1, STEPS + 1))
    behind = {step: {metrics[step][f"training/versions_behind/{end}"] for end in ("min", "max")} for step in metrics}
    # The first batch of each of the two runs is not behind.
    assert behind == {step: {0.0 if step in (1, saved + 1) else 1.0} for step in range(1, STEPS + 1)}
    # The same weights differ by the order of float32 sums. An update without rewards still decays the weights.
    mismatch = {step: metrics[step]["training/rollout_probs_diff_max"] for step in metrics}
    assert all((value > 1e-6) == (behind[step] == {1.0}) for step, value in mismatch.items()), mismatch
    assert prompts_of(tmp_path / "dumps") == run.expected_prompts(STEPS)

    scores = [metrics[step]["critic/score/mean"] for step in range(1, STEPS + 1)]
    assert sum(scores[-4:]) > 2 * sum(scores[:4]), scores
    assert {"timing_s/gen", "timing_s/wait_for_rollout", "timing_s/wait_for_trainer"} <= metrics[2].keys()
