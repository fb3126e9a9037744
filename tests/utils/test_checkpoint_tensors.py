"""Shapes in a checkpoint of torch.distributed.checkpoint, read without torch."""

import os
import pickle

import pytest

from fixtures.dcp_metadata import write_metadata
from verl.utils.checkpoint_tensors import saved_shapes


def test_a_checkpoint_that_torch_wrote(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    state = {"a.weight": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(()), "step": 3}
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    assert saved_shapes(tmp_path) == {"a.weight": (3, 4), "b": ()}


def test_the_fixture_has_the_same_form(tmp_path):
    write_metadata(tmp_path, {"a": (1, 2), "b": ()})
    assert saved_shapes(tmp_path) == {"a": (1, 2), "b": ()}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/verl_must_not_exist",)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", pickle.dumps(3), pickle.dumps({"a": 1}), pickle.dumps(Evil()), b"(" * 100_000]
)
def test_damaged_and_hostile_metadata_are_not_known(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    assert saved_shapes(tmp_path) is None
    assert not os.path.exists("/tmp/verl_must_not_exist")


def test_absent_metadata(tmp_path):
    with pytest.raises(FileNotFoundError):
        saved_shapes(tmp_path)
