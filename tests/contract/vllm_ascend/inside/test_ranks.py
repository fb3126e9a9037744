"""Two tensor-parallel ranks, each a process: the shares that the release's loaders cut, after every update."""

import re

import pytest
from contract.vllm_ascend import ranks
from contract.vllm_ascend.updates import checkpoints

from fixtures.ranks import run_ranks

# 64 inputs for each rank of a row-parallel layer: its groups form pairs in every release.
SIZES = {"hidden_size": 128, "intermediate_size": 256}
O_PROJ, DOWN = "model.layers.1.self_attn.o_proj.weight_scale", "model.layers.0.mlp.experts.3.down_proj.weight_scale"


@pytest.mark.parametrize(
    ("kind", "over", "padded"),
    [("qwen3", {}, O_PROJ), ("llama", {"tied": False}, O_PROJ), ("qwen3_moe", {"moe_intermediate_size": 128}, DOWN)],
    ids=["qwen3", "llama", "qwen3_moe"],
)
def test_each_rank_holds_its_share(tmp_path, kind, over, padded):
    sources = checkpoints(tmp_path, kind, 4, **SIZES, **over)
    for message in run_ranks(2, ranks.update, 2, sources, padded):
        assert re.search(rf"{re.escape(padded)}.*not padded", message)
