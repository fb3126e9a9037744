"""On-policy distillation with a real teacher engine: exact scores, and a policy that moves to its teacher."""

import pytest

from fixtures.tiny import write_tiny_model
from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

STEPS = 12
TEACHER, LOSS = "distillation__teacher_models__teacher_model__", "distillation__distillation_loss__"


def enabled(model, **loss):
    return {
        "distillation__enabled": True,
        "distillation__nnodes": 1,
        "distillation__n_gpus_per_node": 1,
        f"{TEACHER}model_path": model,
        f"{TEACHER}inference__tensor_model_parallel_size": 1,
        **{f"{LOSS}{name}": value for name, value in loss.items()},
    }


def test_a_teacher_that_is_the_policy_scores_as_the_trainer(tmp_path, ray_address):
    """Ragged prompts and responses on two ranks: before the first update, all estimates of k1 are about 0."""
    run = TinyRun(tmp_path, ray_address)
    loss = {"loss_mode": "k1", "use_policy_gradient": True, "use_task_rewards": False}
    text = run.run(
        **enabled(run.model, **loss),
        trainer__n_gpus_per_node=2,
        trainer__total_training_steps=2,
        actor_rollout_ref__actor__ppo_mini_batch_size=8,
        actor_rollout_ref__actor__optim__lr=1e-2,
    )
    assert "teacher engine 0 is up" in text
    first, second = (run.metrics()[step] for step in (1, 2))
    assert 0 < first["distillation/abs_loss"] < 1e-5
    assert second["distillation/abs_loss"] > 1e-3
    assert {"timing_s/teacher", "distillation/loss", "distillation/ppo_kl", "actor/entropy"} <= set(first)


@pytest.mark.parametrize("loss", [{"loss_mode": "k1", "use_policy_gradient": True}, {"loss_mode": "k3"}])
def test_the_policy_moves_to_its_teacher(tmp_path, ray_address, loss):
    """The teacher prefers no token, so that the policy has to learn the same for every prompt."""
    run = TinyRun(tmp_path, ray_address, std=0.15)
    teacher = write_tiny_model(tmp_path / "teacher", seed=7, std=0.001)
    run.run(
        **enabled(teacher, **loss, use_task_rewards=False),
        actor_rollout_ref__actor__ppo_mini_batch_size=8,
        actor_rollout_ref__actor__optim__lr=1e-2,
        actor_rollout_ref__rollout__n=8,
        trainer__total_training_steps=STEPS,
    )
    losses = [run.metrics()[step]["distillation/loss"] for step in range(1, STEPS + 1)]
    assert losses[0] > 0.1 and losses[-1] < 0.5 * losses[0], losses
