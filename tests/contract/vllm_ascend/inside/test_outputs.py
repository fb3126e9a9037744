"""Outputs of updated layers compared with products of matrices that the reference rounded to MXFP8."""

import pytest
from contract.vllm_ascend.products import assert_dense_outputs, assert_expert_products, assert_linear_products
from contract.vllm_ascend.reference import rounded
from contract.vllm_ascend.updates import checkpoints

from fixtures.fake_quant import fake_quantized
from verl.utils.vllm.vllm_fp8_utils import mxfp8_layers

pytestmark = pytest.mark.feature("products")


def test_linear_layers_after_every_update(tmp_path):
    assert_linear_products(checkpoints(tmp_path, "qwen3"), mxfp8_layers, rounded)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_dense_model_equals_a_fake_quantized_one(tmp_path, kind, tied):
    # The default std of transformers: a value on the other side of a rounding boundary changes little.
    assert_dense_outputs(checkpoints(tmp_path, kind, tied=tied, std=0.02), fake_quantized)


def test_experts_after_every_update(tmp_path):
    assert_expert_products(checkpoints(tmp_path, "qwen3_moe"), rounded)
