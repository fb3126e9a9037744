"""Two tensor-parallel ranks, each a process: the shares that the release's loaders cut, after every update."""

import re

import pytest
from contract.vllm_ascend import ranks
from contract.vllm_ascend.harness import RELEASE
from contract.vllm_ascend.updates import checkpoints

from fixtures.ranks import run_ranks

# 64 inputs for each rank of a row-parallel layer: its groups form pairs in every release.
SIZES = {"hidden_size": 128, "intermediate_size": 256}
O_PROJ, DOWN = "model.layers.1.self_attn.o_proj.weight_scale", "model.layers.0.mlp.experts.3.down_proj.weight_scale"


@pytest.mark.feature("shares")
@pytest.mark.skipif(RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1"), reason="the release does not pad shares")
@pytest.mark.parametrize("inner", [96, 80], ids=["48 inputs each", "40 inputs each"])
def test_shares_that_begin_inside_a_group_are_padded(tmp_path, inner):
    """The group at the border belongs to both ranks, and its scale is loaded by both."""
    sources = checkpoints(tmp_path, "qwen3", 4, hidden_size=128, intermediate_size=inner)
    run_ranks(2, ranks.update, 2, sources, O_PROJ)


@pytest.mark.feature("ranks")
@pytest.mark.parametrize(
    ("kind", "over", "padded"),
    [("qwen3", {}, O_PROJ), ("llama", {"tied": False}, O_PROJ), ("qwen3_moe", {"moe_intermediate_size": 128}, DOWN)],
    ids=["qwen3", "llama", "qwen3_moe"],
)
def test_each_rank_holds_its_share(tmp_path, kind, over, padded):
    sources = checkpoints(tmp_path, kind, 4, **SIZES, **over)
    for message in run_ranks(2, ranks.update, 2, sources, padded):
        assert re.search(rf"{re.escape(padded)}.*not padded", message)
