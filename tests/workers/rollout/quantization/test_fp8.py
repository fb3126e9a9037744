"""Encoding for `rollout.quantization=fp8`."""

import torch


def test_scales_of_blocks_are_sent(wide, scheme, weights_of):
    weights = weights_of(wide)
    sent = dict(scheme("fp8", wide).encode(weights.items()))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (sent[name].dtype, sent[f"{name}_scale_inv"].shape) == (torch.float8_e4m3fn, (2, 2))
    assert sent[f"{name}_scale_inv"].dtype == torch.float32
    assert set(sent) == set(weights) | {f"{key}_scale_inv" for key in weights if key.endswith("_proj.weight")}
