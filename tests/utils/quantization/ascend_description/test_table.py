"""The table of layers."""

import re

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_description.table import render_table


def test_unknown_layers_stay_unquantized_and_are_counted(tmp_path):
    config, tensors = small_decoder()
    tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"] = ((256, 64), "BF16")
    description = build_description(write_header_checkpoint(tmp_path, config, tensors))
    assert not description.is_quantized("model.layers.0.linear_attn.in_proj_qkvz.weight")
    assert re.search(r"in_proj_qkvz +1 +256 x 64 .*unknown kind of layer", render_table(description))
    assert "Warning: 1 layers are of an unknown kind" in render_table(description)
