"""Files as ranks on several hosts see them."""

import asyncio
import os

import pytest

from verl.config import PPOConfig
from verl.trainer.ppo.shared_files import check_seen, check_shared, files_of
from verl.workers.train_worker import TrainWorker

ADDRESSES = ["10.0.0.1", "10.0.0.2"]


class Ranks:
    """Ranks whose hosts have the files below a root of their own: "/" is this host's disk."""

    def __init__(self, *roots):
        self.roots = roots

    async def all(self, method, paths):
        assert method is TrainWorker.missing_paths
        return [[path for path in paths if not os.path.exists(f"{root}{path}")] for root in self.roots]


def test_a_directory_that_all_ranks_see(tmp_path):
    asyncio.run(check_shared(tmp_path / "new", Ranks("/", "/"), ADDRESSES))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_rank_on_a_host_with_a_disk_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"default_local_dir=.*: rank 1 on 10\.0\.0\.2 does not see"):
        asyncio.run(check_shared(tmp_path / "run", Ranks("/", tmp_path / "other"), ADDRESSES))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_host_that_lacks_the_model(tmp_path):
    (tmp_path / "model").mkdir()
    config = PPOConfig()
    config.actor_rollout_ref.model.path = str(tmp_path / "model")
    config.actor_rollout_ref.model.external_lib = ["a_module_by_name"]
    paths = files_of(config)
    assert paths == {"actor_rollout_ref.model.path": str(tmp_path / "model")}
    asyncio.run(check_seen(paths, Ranks("/", "/"), ADDRESSES))
    with pytest.raises(FileNotFoundError, match=r"^actor_rollout_ref\.model\.path=.*: rank 1 on 10\.0\.0\.2 does not"):
        asyncio.run(check_seen(paths, Ranks("/", tmp_path / "other"), ADDRESSES))
