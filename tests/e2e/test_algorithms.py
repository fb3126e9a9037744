"""Runs of algorithms with more parts than GRPO: a critic, dynamic sampling, greedy baselines, bypass mode."""

import json
from collections import defaultdict

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

ALGORITHM = "algorithm__"
CORRECTION = "algorithm__rollout_correction__preset"

SPY = """
import json, os
from verl.trainer.ppo.core_algos import register_adv_est

@register_adv_est("spy")
def spy(token_level_rewards, response_mask, index, config, non_tensor_batch):
    rows = [[str(uid), float(hits)] for uid, hits in zip(index, non_tensor_batch["hits"])]
    with open(os.path.join(os.path.dirname(__file__), "seen.jsonl"), "a") as file:
        file.write(json.dumps(rows) + "\\n")
    advantages = token_level_rewards.sum(-1, keepdim=True) * response_mask
    return advantages, advantages
"""


@pytest.mark.smoke
def test_ppo_with_a_critic_on_a_quantized_rollout_resumes(tmp_path):
    run = TinyRun(tmp_path, std=0.02)
    settings = {
        "algorithm__adv_estimator": "gae",
        "algorithm__lam": 0.95,
        "critic__model__path": run.model,
        "critic__optim__lr": 1e-3,
        "trainer__critic_warmup": 1,
        "algorithm__use_kl_in_reward": True,
        "algorithm__kl_ctrl__type": "adaptive",
        "algorithm__kl_ctrl__horizon": 100,
        CORRECTION: "decoupled_token_is",
        "actor_rollout_ref__rollout__quantization": "ascend",
        "trainer__n_gpus_per_node": 2,
        "trainer__save_freq": 2,
    }
    run.run(**settings)
    run.run(**settings, trainer__total_training_steps=3)
    metrics = run.metrics()
    assert sorted(metrics) == [1, 2, 3]
    # Only the critic learns in step 1. Its head starts at 0, and step 3 continues with the head of the checkpoint.
    assert ["actor/pg_loss" in metrics[step] for step in (1, 2, 3)] == [False, True, True]
    assert metrics[1]["critic/values/mean"] == 0.0
    assert metrics[2]["critic/values/max"] != 0.0 and metrics[3]["critic/values/max"] != 0.0
    weight = 0.001
    for step in (1, 2, 3):
        data = metrics[step]
        assert data["critic/grad_norm"] > 0 and data["critic/vf_loss"] > 0
        assert 0.5 < data["rollout_corr/rollout_is_mean"] < 1.5
        assert data["actor/reward_kl_penalty_coeff"] == pytest.approx(weight, rel=1e-9)
        error = min(max(data["actor/reward_kl_penalty"] / 0.1 - 1, -0.2), 0.2)
        weight *= 1 + error * 32 / 100
    assert (run.out / "global_step_2" / "critic").is_dir()


def test_dynamic_sampling_trains_on_a_full_batch_of_mixed_groups(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    (tmp_path / "spy.py").write_text(SPY)
    run.run(
        algorithm__adv_estimator="spy",
        actor_rollout_ref__model__external_lib="spy.py",
        algorithm__filter_groups__enable=True,
        algorithm__filter_groups__metric="hits",
        data__gen_batch_size=4,
    )
    # The first call is the check of the estimator before the run.
    batches = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()][1:]
    metrics = run.metrics()
    assert len(batches) == 2
    for batch, data in zip(batches, (metrics[1], metrics[2]), strict=True):
        groups = defaultdict(list)
        for uid, hits in batch:
            groups[uid].append(hits)
        assert len(groups) == 8
        assert all(len(hits) == 4 and len(set(hits)) > 1 for hits in groups.values())
        assert data["train/num_gen_batches"] > 2  # of four prompts: two would be enough if no group were dropped
        assert data["dynamic_sampling/dropped_groups"] > 0


def test_bypass_mode_with_a_greedy_baseline(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address, std=0.02)
    text = run.run(
        algorithm__adv_estimator="remax",
        algorithm__rollout_correction__bypass_mode=True,
        algorithm__rollout_correction__loss_type="reinforce",
        algorithm__rollout_correction__rollout_is="token",
        algorithm__rollout_correction__rollout_rs="seq_mean_k1",
        algorithm__rollout_correction__rollout_rs_threshold="0.99_1.01",
        actor_rollout_ref__rollout__quantization="ascend",
        actor_rollout_ref__actor__fsdp_config__qat__enable=False,  # a mismatch to correct for
    )
    assert "step 2/2" in text
    for data in run.metrics().values():
        assert "timing_s/old_log_prob" not in data
        assert 0 < data["rollout_corr/k3_kl"] < 0.1
        assert 0 < data["rollout_corr/rollout_is_mean"] < 2
        assert 0 < data["rollout_corr/rollout_rs_masked_fraction"] < 1
        assert data["actor/grad_norm"] > 0
