"""The directory of checkpoints as ranks on several hosts see it."""

import asyncio

import pytest

from verl.trainer.ppo.shared_directory import check_shared

ADDRESSES = ["10.0.0.1", "10.0.0.2"]


class Ranks:
    """Ranks whose hosts have the files below a root of their own: "/" is this host's disk."""

    def __init__(self, *roots):
        self.roots = roots

    async def all(self, method, path):
        assert method == "read_text"
        return [self._read(f"{root}{path}") for root in self.roots]

    def _read(self, file):
        try:
            with open(file) as opened:
                return opened.read()
        except FileNotFoundError:
            return None


def test_a_directory_that_all_ranks_see(tmp_path):
    asyncio.run(check_shared(tmp_path / "new", Ranks("/", "/"), ADDRESSES))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_rank_on_a_host_with_a_disk_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"default_local_dir=.*: rank 1 on 10\.0\.0\.2 cannot read"):
        asyncio.run(check_shared(tmp_path / "run", Ranks("/", tmp_path / "other"), ADDRESSES))
    assert list((tmp_path / "run").iterdir()) == []
