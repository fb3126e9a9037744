"""A delta update leaves a running engine with the same bits as a full update, at each of twenty steps."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.delta_steps import check_delta_steps, send_delta
from fixtures.engine import PROMPTS, log_probs_of, weights_of
from verl.config import RolloutConfig
from verl.workers.weight_sync.manifest import WeightUpdateError

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


# With AMX, vLLM by default frees a weight that its attention absorbs.
@pytest.mark.parametrize("options", [{}, {"attention_config": {"backend": "CPU_MLA"}}], ids=["chosen", "reference"])
def test_latent_attention_takes_full_updates_only(tiny_models, engines, options):
    """A delta would leave the matrices that the attention derives from `kv_b_proj` as they were."""
    # The only sizes that vLLM's latent attention on a CPU supports.
    sizes = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": 64,
        "num_key_value_heads": 4,
    }
    directories = tiny_models(2, kind="deepseek_v3", tied=False, std=0.05, **sizes)
    engine, _ = engines.get(directories[0], dtype="bfloat16", **options)
    for version, directory in enumerate((*directories, directories[0])):
        weights = weights_of(directory)
        assert not engine.update(weights.items(), version, dtype=torch.bfloat16)[0]["accepts_delta"]
        responses, log_probs = engine.sample(4)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        assert (log_probs - log_probs_of(model, responses, PROMPTS)).abs().mean() < 0.05
    with pytest.raises(WeightUpdateError, match="multi-head latent attention needs a full update"):
        send_delta(engine, weights, weights, 3)
