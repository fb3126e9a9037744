"""One step of lag: the run generates a batch while it trains on the batch before."""

import os
import signal

import pyarrow.parquet as pq
import pytest

from fixtures.training import TinyRun, alive, descendants, prompts_of
from verl.utils.dataset.loader import EpochSampler

pytestmark = pytest.mark.e2e

STEPS, BATCH, ROWS, SAMPLES = 20, 8, 64, 4


def expected_prompts(run):
    """Texts of the prompts by step, one entry for each sample: the data in the order of seed 0."""
    words = [row["prompt"][0]["content"] for row in pq.read_table(run.train).to_pylist()]
    sampler = EpochSampler(ROWS, shuffle=True, seed=0)
    order = [row for epoch in range(STEPS * BATCH // ROWS + 1) for row in sampler.order(epoch)]
    return {
        step: [f"<s>{words[row]}=" for row in order[(step - 1) * BATCH : step * BATCH] for _ in range(SAMPLES)]
        for step in range(1, STEPS + 1)
    }


@pytest.mark.smoke
def test_a_run_learns_one_version_behind_and_resumes_with_the_next_prompts_when_killed(tmp_path):
    run = TinyRun(tmp_path)
    settings = dict(
        trainer__rollout_lag=1,
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
    process = run.start(**settings)
    run.wait_for(lambda: (run.out / "global_step_3").exists(), process)
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert alive(family) == []
    saved = int((run.out / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < STEPS - 1, "killed too late to have a batch in flight"
    run.run(**settings)

    metrics = run.metrics()
    assert sorted(metrics) == list(range(1, STEPS + 1))
    behind = {step: {metrics[step][f"training/versions_behind/{end}"] for end in ("min", "max")} for step in metrics}
    # The first batch of each of the two runs is not behind.
    assert behind == {step: {0.0 if step in (1, saved + 1) else 1.0} for step in range(1, STEPS + 1)}
    mismatch = {step: metrics[step]["training/rollout_probs_diff_max"] for step in metrics}
    assert all((value > 1e-4) == (behind[step] == {1.0}) for step, value in mismatch.items()), mismatch
    assert prompts_of(tmp_path / "dumps") == expected_prompts(run)

    scores = [metrics[step]["critic/score/mean"] for step in range(1, STEPS + 1)]
    assert sum(scores[-4:]) > 2 * sum(scores[:4]), scores
    assert {"timing_s/gen", "timing_s/wait_for_rollout", "timing_s/wait_for_trainer"} <= metrics[2].keys()
