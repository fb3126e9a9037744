"""Requirements and vLLM arguments of `rollout.quantization=ascend`."""

import json

import pytest

from fixtures.scheme_models import EMBEDDING, Q_PROJ
from verl.utils.quantization.schemes import ascend


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


@pytest.mark.parametrize(("release", "fits"), [("0.23.0", False), ("0.26.0rc1", False), ("0.28.0rc1", True)])
def test_release_decides_whether_a_share_may_begin_inside_a_block(dense, make, monkeypatch, release, fits):
    monkeypatch.setattr(ascend, "check_vllm_ascend", lambda: release)
    chosen = make("ascend", dense, tensor_model_parallel_size=2, dtype="bfloat16")
    if fits:
        chosen.validate("npu", installed=True)
        return
    with pytest.raises(ValueError, match=r"down_proj.*80 inputs, 40 per rank"):
        chosen.validate("npu", installed=True)


def test_plan_for_an_npu_assumes_the_newest_release(dense, make):
    """Does not raise."""
    make("ascend", dense, tensor_model_parallel_size=2, dtype="bfloat16").validate("npu", installed=False)
