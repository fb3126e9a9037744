import pytest

ROLLOUT = "actor_rollout_ref.rollout"


def test_update_bytes_of_fp8(examine_on):
    """1 byte per weight of a projection, a float32 scale for 128 x 128 of them, bfloat16 for all other weights."""
    keys = {f"{ROLLOUT}.quantization": "fp8", "trainer.device": "cuda"}
    plan, _ = examine_on("Qwen3-8B", keys, "cuda:h200")
    hidden, width, layers, kv, words = 4096, 12288, 36, 1024, 151936
    elements = layers * hidden * (2 * hidden + 2 * kv + 3 * width)
    plain = 2 * words * hidden + layers * (2 * hidden + 256) + hidden
    assert plan.update_bytes == elements + 4 * elements // (128 * 128) + 2 * plain
    keys[f"{ROLLOUT}.quantization_side"] = "receiver"
    assert examine_on("Qwen3-8B", keys, "cuda:h200")[0].update_bytes == 2 * (elements + plain)


@pytest.mark.parametrize(("tp", "fits"), [(4, True), (8, False)])
def test_experts_need_pairs_of_blocks_on_each_rank(examine_on, tp, fits):
    """768 inputs of an expert: 192 on each of 4 ranks, 96 on each of 8, which no known vllm-ascend pairs."""
    _, found = examine_on("Qwen3-30B-A3B", {f"{ROLLOUT}.tensor_model_parallel_size": tp})
    about = [text for text in found.errors if "96 inputs on a rank" in text and "quantization_config_file" in text]
    assert bool(about) is not fits
