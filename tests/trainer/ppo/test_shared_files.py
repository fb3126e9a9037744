"""Files that ranks on several hosts must see."""

import asyncio
import os

import pytest

from verl.config import PPOConfig
from verl.trainer.ppo.shared_files import check_shared_directory, check_visible_paths, input_paths
from verl.workers.train_worker import TrainWorker

ADDRESSES = ["10.0.0.1", "10.0.0.2"]


class Ranks:
    """Ranks on hosts whose disks are simulated by root directories; "/" is the disk of this host."""

    def __init__(self, *roots):
        self.roots = roots

    async def all(self, method, paths):
        assert method is TrainWorker.missing_paths
        return [[path for path in paths if not os.path.exists(f"{root}{path}")] for root in self.roots]


def test_a_shared_directory_passes_and_stays_empty(tmp_path):
    asyncio.run(check_shared_directory(tmp_path / "new", Ranks("/", "/"), ADDRESSES))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_rank_that_does_not_see_the_directory_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"default_local_dir=.*: rank 1 on 10\.0\.0\.2 does not see"):
        asyncio.run(check_shared_directory(tmp_path / "run", Ranks("/", tmp_path / "other"), ADDRESSES))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_host_without_the_model_is_reported(tmp_path):
    (tmp_path / "model").mkdir()
    config = PPOConfig()
    config.actor_rollout_ref.model.path = str(tmp_path / "model")
    config.actor_rollout_ref.model.external_lib = ["a_module_by_name"]
    paths = input_paths(config)
    assert paths == {"actor_rollout_ref.model.path": str(tmp_path / "model")}
    asyncio.run(check_visible_paths(paths, Ranks("/", "/"), ADDRESSES))
    with pytest.raises(FileNotFoundError, match=r"^actor_rollout_ref\.model\.path=.*: rank 1 on 10\.0\.0\.2 does not"):
        asyncio.run(check_visible_paths(paths, Ranks("/", tmp_path / "other"), ADDRESSES))
