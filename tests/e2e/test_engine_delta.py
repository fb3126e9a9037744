"""A delta update leaves a running engine with the same bits as a full update, at each of twenty steps."""

import pytest
import torch

from fixtures.delta_steps import check_delta_steps
from fixtures.engine import weights_of
from verl.config import RolloutConfig

pytestmark = pytest.mark.e2e

# The engine pads this vocabulary too; it makes such a table after all other weights.
PARTIAL = {"hidden_size": 96, "intermediate_size": 80, "vocab_size": 100}
# Blocks of 128 x 128 that are not full; the borders of fused layers are borders of blocks.
FP8 = {"hidden_size": 192, "intermediate_size": 256, "num_key_value_heads": 4}
CASES = {
    "experts, packed by the engine": (None, "qwen3_moe", True, {}, {"dtype": "bfloat16"}),
    "experts, router in float32": (None, "glm4_moe", False, {}, {"dtype": "bfloat16"}),
    "dense, tied, in MXFP8": ("ascend", "qwen3", True, PARTIAL, {}),
    "dense, in fp8": ("fp8", "qwen3", True, FP8, {"dtype": "bfloat16"}),
    "dense, packed by the engine": (None, "llama", False, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_delta_updates_equal_full_updates(tiny_models, engines, case):
    quantization, kind, tied, sizes, over = CASES[case]
    (model_dir,) = tiny_models(1, kind=kind, tied=tied, std=0.02, **sizes)
    rollout = RolloutConfig(quantization=quantization, tensor_model_parallel_size=1)
    engine, scheme = engines.get(model_dir, rollout, **over)
    check_delta_steps(engine, scheme, weights_of(model_dir), getattr(torch, over.get("dtype", "float32")), steps=20)
