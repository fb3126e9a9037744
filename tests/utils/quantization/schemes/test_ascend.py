"""Requirements and vLLM arguments of `rollout.quantization=ascend`."""

import json

import pytest

from fixtures.scheme_models import EMBEDDING, Q_PROJ


def test_every_layer_is_described(dense, make):
    overrides = make("ascend", dense).engine_overrides("cpu")
    assert overrides["quantization"] == "ascend"
    description = overrides["hf_overrides"]["quantization_config"]
    assert description["quant_method"] == "ascend"
    assert description["group_size"] == 32
    assert description[Q_PROJ] == "W8A8_MXFP8"
    assert description[EMBEDDING] == "FLOAT"
    assert json.loads(json.dumps(description)) == description


def test_cuda_is_not_supported(dense, make):
    with pytest.raises(ValueError, match=r"quantization=ascend.*not on cuda"):
        make("ascend", dense).engine_overrides("cuda")


def test_npu_needs_vllm_ascend(dense, make):
    with pytest.raises(ValueError, match="vllm-ascend is not installed"):
        make("ascend", dense).engine_overrides("npu")


def test_tensor_parallel_cut_inside_a_block_is_rejected(dense, make):
    with pytest.raises(ValueError, match=r"down_proj.*80 inputs, 40 per rank"):
        make("ascend", dense, tensor_model_parallel_size=2).engine_overrides("cpu")
