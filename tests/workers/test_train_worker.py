"""The process of a trainer rank: actor and critic in one process group."""

import pytest

from fixtures.critic_cases import critic_batch, critic_config
from fixtures.engine_cases import worker_config
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import CRITIC_COLUMNS, split_mini_batches
from verl.workers.train_worker import TrainWorker


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def test_actor_and_critic_share_a_process_group(model_dir):
    """Both workers run in one process."""
    worker = TrainWorker(
        0,
        world_size=1,
        config=worker_config(model_dir),
        device="cpu",
        total_training_steps=10,
        max_model_len=64,
        with_ref=False,
        seed=0,
        rollout_dtype="float32",
        critic=critic_config(model_dir),
        bypass=None,
    )
    data = critic_batch(12)
    updates = split_mini_batches(data, 12, 1, columns=CRITIC_COLUMNS)[0]
    try:
        worker.setup("127.0.0.1", worker.reserve_port("127.0.0.1"), "127.0.0.1")
        assert worker.compute_log_prob(data).batch["old_log_probs"].any()
        before = worker.compute_values(data).batch["values"]
        metrics = worker.update_critic(updates)
        after = worker.compute_values(data).batch["values"]
    finally:
        worker._actor.close()
    assert metrics["critic/grad_norm"] > 0
    assert not before.any() and after.any()


def test_critic_methods_are_an_error_in_a_run_without_a_critic(model_dir):
    options = {"world_size": 1, "config": worker_config(model_dir), "device": "cpu", "total_training_steps": 1}
    worker = TrainWorker(0, **options, max_model_len=64, with_ref=False, seed=0, rollout_dtype="float32")
    with pytest.raises(AssertionError, match="no critic"):
        worker.compute_values(critic_batch(2))
