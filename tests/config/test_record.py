"""The files that record the config of a run."""

import pytest
import yaml

from verl.config import load_config
from verl.config.record import changes, flat, write_record

GIVEN = [
    "data.train_batch_size=64",
    "actor_rollout_ref.rollout.quantization=ascend",
    "trainer.logger=[file]",
    "trainer.nnodes=1",  # the default
    "+ray_kwargs.ray_init.runtime_env={env_vars:{WANDB_API_KEY:hunter2}}",
]


@pytest.fixture
def written(tmp_path):
    write_record(load_config([*GIVEN, f"trainer.default_local_dir={tmp_path}/run"]), tmp_path / "run")
    return tmp_path / "run"


def test_record_loads_as_the_same_config(tmp_path):
    config = load_config([*GIVEN[:-1], "trainer.project_name='p: q #'", f"trainer.default_local_dir={tmp_path}/run"])
    write_record(config, tmp_path / "run")
    assert load_config(config_path=tmp_path / "run", config_name="config") == config


def test_changes_contain_values_that_differ_from_the_defaults(written):
    read = yaml.safe_load((written / "config_changes.yaml").read_text())
    assert read.pop("ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY") == {"value": "***", "default": None}
    assert read == {
        "data.train_batch_size": {"value": 64, "default": 1024},
        "actor_rollout_ref.rollout.quantization": {"value": "ascend", "default": None},
        "trainer.logger": {"value": ["file"], "default": ["console", "file"]},
        "trainer.default_local_dir": {
            "value": str(written),
            "default": load_config().trainer.default_local_dir,
        },
    }


def test_defaults_have_no_changes():
    assert changes(load_config()) == {}


def test_files_contain_no_secrets(written):
    texts = [path.read_text() for path in written.iterdir()]
    assert len(texts) == 2
    assert "hunter2" not in "".join(texts)
    assert "WANDB_API_KEY: '***'" in "".join(texts)


def test_flat_keeps_empty_sections():
    assert flat({"a": {"b": {"c": 1, "d": {}}}, "e": [2]}) == {"a.b.c": 1, "a.b.d": {}, "e": [2]}
