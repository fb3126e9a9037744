"""`build`: conversion of values to the types of the dataclasses."""

from fixtures.config_error import load_error
from verl.config import PPOConfig, load_config
from verl.config.build import build


def test_on_and_off_stay_choices_although_yaml_reads_truth_values():
    values = {"actor_rollout_ref": {"rollout": {"checkpoint_engine": {"delta": False}}}}
    assert build(PPOConfig, values).actor_rollout_ref.rollout.checkpoint_engine.delta == "off"
    flags = {"actor_rollout_ref": {"rollout": {"calculate_log_probs": False}}}
    assert build(PPOConfig, flags).actor_rollout_ref.rollout.calculate_log_probs is False


WRONG_TYPES = {
    "trainer.total_epochs=abc": "must be a whole number",
    "trainer.test_freq=1.5": "must be a whole number",
    "trainer.save_freq=null": "must be a whole number, not null",
    "trainer.seed=True": "must be a whole number",
    "data.shuffle=yes": "must be True or False",
    "trainer.val_only=1": "must be True or False",
    "actor_rollout_ref.actor.optim.lr=fast": "must be a number",
    "actor_rollout_ref.actor.optim.weight_decay=nan": "must be a number",
    "actor_rollout_ref.actor.optim.betas=[0.9,x]": "must be a list such as [1,2]",
    "data.train_files={a:1}": "must be text or a list such as [a,b]",
    "reward.reward_kwargs=3": "must be a mapping",
}


def test_wrong_types_are_reported_together():
    lines = load_error(*WRONG_TYPES).splitlines()
    assert lines[0] == f"{len(WRONG_TYPES)} problems:"
    for override, expected in WRONG_TYPES.items():
        name = override.split("=")[0]
        (line,) = [line for line in lines if line.startswith(f"- {name}=")]
        assert expected in line and (line.startswith(f"- {override}: ") or "{" in override or "[" in override)


def test_numbers_out_of_range():
    for text in ("9" * 400, "-" + "9" * 400):
        assert "optim.lr=" in (problem := load_error(f"actor_rollout_ref.actor.optim.lr={text}"))
        assert problem.endswith("...: must be a number") and len(problem) < 300
    for value in (2**31, -(2**31), "2147483648.0", "9" * 400):
        problem = load_error(f"data.train_batch_size={value}")
        assert problem.startswith("data.train_batch_size=") and "must be a whole number" in problem
    assert "cannot be read as key=value (Exceeds the limit" in load_error(f"data.seed={'9' * 5000}")
    assert load_error(f"data.train_batch_size={2**31}").endswith("a whole number, at most 2147483647")
    assert load_config([f"trainer.seed={2**31 - 1}"]).trainer.seed == 2**31 - 1


def test_values_are_converted():
    config = load_config(
        [
            "actor_rollout_ref.actor.optim.lr='1e-6'",
            "actor_rollout_ref.actor.entropy_coeff=0",
            "trainer.experiment_name=123",
            "trainer.logger=console",
            "trainer.total_epochs=3.0",
            "reward.timeout=5",
            "trainer.total_training_steps=null",
        ]
    )
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    assert isinstance(config.actor_rollout_ref.actor.entropy_coeff, float)
    assert config.trainer.experiment_name == "123"
    assert config.trainer.logger == ["console"]
    assert config.trainer.total_epochs == 3 and isinstance(config.trainer.total_epochs, int)
    assert config.trainer.total_training_steps is None


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = load_config(["actor_rollout_ref.model.path=~/m", "trainer.default_local_dir=out"])
    assert config.actor_rollout_ref.model.path == str(tmp_path / "m")
    assert config.trainer.default_local_dir == str(tmp_path / "out")
