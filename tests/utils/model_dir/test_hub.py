"""The name of a model on the Hugging Face hub is replaced by its directory in the hub's cache."""

import pytest

from verl.config import ConfigError, load_config
from verl.preflight import check

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with one model, in the layout of huggingface_hub."""
    import huggingface_hub.constants

    snapshot = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_cached_names_become_directories(cache):
    keys = ("actor_rollout_ref.model.path", "critic.model.path", "critic.model.tokenizer_path")
    config = load_config([f"{key}=Qwen/Qwen3-8B" for key in keys])
    assert config.actor_rollout_ref.model.path == str(cache)
    assert config.critic.model.path == config.critic.model.tokenizer_path == str(cache)


def test_existing_directory_takes_precedence(cache, tmp_path):
    (tmp_path / "Qwen/Qwen3-8B").mkdir(parents=True)
    config = load_config(["actor_rollout_ref.model.path=Qwen/Qwen3-8B"])
    assert config.actor_rollout_ref.model.path == str(tmp_path / "Qwen/Qwen3-8B")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-9B", "models/my--model", "../x", "a/b/c", "/absolute/model", "model"])
def test_other_paths_stay_paths(cache, tmp_path, name):
    config = load_config([f"actor_rollout_ref.model.path={name}"])
    assert config.actor_rollout_ref.model.path == str((tmp_path / name).resolve())


def test_data_paths_are_not_looked_up_in_the_cache(cache, tmp_path):
    assert load_config(["trainer.rollout_data_dir=Qwen/Qwen3-8B"]).trainer.rollout_data_dir == str(
        tmp_path / "Qwen/Qwen3-8B"
    )


def test_error_for_an_uncached_name_says_how_to_download_it(cache, run_files):
    overrides = run_files.overrides(actor_rollout_ref__model__path="Qwen/Qwen3-32B")
    with pytest.raises(ConfigError) as caught:
        check(load_config(overrides))
    (problem,) = caught.value.problems
    assert problem.startswith("actor_rollout_ref.model.path=")
    assert "run `hf download Qwen/Qwen3-32B` and the same command again" in problem
    with pytest.raises(ConfigError, match=r"local-dir DIR`\)$"):
        check(load_config(run_files.overrides(actor_rollout_ref__model__path="/nowhere/Qwen3-32B")))
