"""Requirements and vLLM arguments of `rollout.quantization=ascend`."""

import json

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from fixtures.scheme_models import EMBEDDING, Q_PROJ
from fixtures.tiny import write_tiny_model
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


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_whole_experts_are_not_cut_inside_a_block(tmp_path, make, device):
    """64 inputs of an expert, 16 on each of four ranks."""
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj .*16 per rank: use .* or expert_parallel_size=4"):
        make("ascend", directory, tensor_model_parallel_size=4).validate(device, installed=False)
    make("ascend", directory, tensor_model_parallel_size=4, expert_parallel_size=4).validate(device, installed=False)


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


@pytest.mark.parametrize(("release", "exact"), [("0.23.0", False), ("0.26.0rc1", False), ("0.28.0rc1", True)])
def test_release_decides_whether_a_name_may_start_with_another(tmp_path, make, monkeypatch, release, exact):
    monkeypatch.setattr(ascend, "check_vllm_ascend", lambda: release)
    config, tensors = small_decoder()
    tensors["model.layers.1.self_attn.o_proj_extra.weight"] = ((64, 64), "BF16")
    chosen = make("ascend", write_header_checkpoint(tmp_path, config, tensors), dtype="bfloat16")
    chosen.validate("cpu", installed=True)
    chosen.validate("npu", installed=False)
    if exact:
        chosen.validate("npu", installed=True)
        return
    with pytest.raises(
        ValueError, match=rf"o_proj is quantized and .*o_proj_extra is not.*vllm-ascend {release} would"
    ):
        chosen.validate("npu", installed=True)


@pytest.mark.parametrize(
    ("chosen", "device", "runs"),
    [(None, "npu", True), (None, "cpu", False), (True, "cpu", True), (True, "npu", True), (False, "npu", False)],
)
def test_self_test_is_on_by_default_on_an_npu_only(dense, make, chosen, device, runs):
    assert make("ascend", dense, quantization_self_test=chosen).runs_self_test(device) is runs


def test_untested_release_needs_the_self_test(dense, make, monkeypatch):
    monkeypatch.setattr(ascend, "check_vllm_ascend", lambda: "0.31.0rc1")
    for chosen in (None, True):
        make("ascend", dense, dtype="bfloat16", quantization_self_test=chosen).validate("npu", installed=True)
    message = (
        r"quantization_self_test=False: vllm-ascend 0\.31\.0rc1 is newer than .* 0\.30\.0rc2, .*use null, or install"
    )
    with pytest.raises(ValueError, match=message):
        make("ascend", dense, dtype="bfloat16", quantization_self_test=False).engine_overrides("npu")
    monkeypatch.setattr(ascend, "check_vllm_ascend", lambda: "0.30.0rc2")
    make("ascend", dense, dtype="bfloat16", quantization_self_test=False).engine_overrides("npu")


def test_scheme_of_every_quantized_layer(wide, make):
    overrides = make("ascend", wide, quantization_scheme="W4A8_MXFP").engine_overrides("cpu")
    description = overrides["hf_overrides"]["quantization_config"]
    assert description[Q_PROJ] == "W4A8_MXFP" and description[EMBEDDING] == "FLOAT"
    assert make("ascend", wide, quantization_scheme="W4A8_MXFP").summary().startswith("MXFP4: 14 of")
    assert make("ascend", wide, quantization_scheme="W8A8_MXFP8").summary() == make("ascend", wide).summary()
    errors = [make("ascend", wide, quantization_scheme=scheme).weight_error for scheme in ("W4A8_MXFP", None)]
    assert errors[0] > 4 * errors[1] > 0


@pytest.mark.parametrize("name", ["fp8", "torchao", None])
def test_scheme_of_another_quantization_is_rejected(wide, make, tmp_path, name):
    file = {"quantization_config_file": str(tmp_path / "torchao.json")} if name == "torchao" else {}
    chosen = make(name, wide, quantization_scheme="W4A8_MXFP", **file)
    message = (
        rf"quantization_scheme=W4A8_MXFP: \S+quantization={name or 'null'} has no schemes; use quantization=ascend"
    )
    with pytest.raises(ValueError, match=message):
        chosen.validate_settings("cpu")


def test_scheme_beside_a_file_is_rejected(wide, make, tmp_path):
    chosen = make("ascend", wide, quantization_scheme="W4A8_MXFP", quantization_config_file=str(tmp_path / "x.json"))
    with pytest.raises(
        ValueError, match=r"quantization_scheme=W4A8_MXFP: .*quantization_config_file=.*x.json describes"
    ):
        chosen.validate_settings("cpu")


def test_unknown_scheme_is_rejected(wide, make):
    with pytest.raises(
        ValueError, match="quantization_scheme=W4A4_MXFP4: must be null or one of W8A8_MXFP8, W4A8_MXFP"
    ):
        make("ascend", wide, quantization_scheme="W4A4_MXFP4").validate_settings("cpu")


@pytest.mark.parametrize(("release", "fits"), [("0.26.0rc1", False), ("0.28.0rc1", True)])
def test_release_decides_whether_weights_may_be_in_mxfp4(wide, make, monkeypatch, release, fits):
    monkeypatch.setattr(ascend, "check_vllm_ascend", lambda: release)
    chosen = make("ascend", wide, quantization_scheme="W4A8_MXFP")
    if fits:
        chosen.validate("npu", installed=True)
        return
    with pytest.raises(ValueError, match=r"W4A8_MXFP, and vllm-ascend 0\.26\.0rc1 cannot replace such weights"):
        chosen.validate("npu", installed=True)


def test_inputs_that_are_no_multiple_of_64_are_rejected(dense, make):
    with pytest.raises(
        ValueError, match=r"down_proj \[96, 80\] has 80 inputs on a rank .*W4A8_MXFP takes multiples of 64"
    ):
        make("ascend", dense, quantization_scheme="W4A8_MXFP").engine_overrides("cpu")
