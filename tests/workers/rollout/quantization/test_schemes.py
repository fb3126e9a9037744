"""What a quantization tells the engine, what it sends, and what it refuses, without an engine."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fixtures.fake_quant import mxfp8_round_trip
from fixtures.tiny import write_tiny_model
from fixtures.torchao import torchao_directory
from verl.config import RolloutConfig
from verl.utils.quantization.mx import mxfp8_dequantize
from verl.workers.rollout.quantization import SCHEME_NAMES, get_scheme, scheme_class
from verl.workers.rollout.quantization.scaled import ScaledWeights
from verl.utils.quantization.encode_report import errors_by_depth, merged_errors, worst_error
from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError

ROLLOUT = RolloutConfig(tensor_model_parallel_size=1, dtype="bfloat16")
Q_PROJ, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
FP8_SIZES = dict(hidden_size=192, intermediate_size=256, num_key_value_heads=4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("dense"), hidden_size=96, intermediate_size=80)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("experts"), kind="qwen3_moe")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("wide"), **FP8_SIZES)


def scheme(name, model_dir, **over):
    return get_scheme(replace(ROLLOUT, quantization=name, **over), str(model_dir))


def weights_of(model_dir):
    return load_file(model_dir / "model.safetensors")


@pytest.mark.parametrize("name", ["mxfp8", "Ascend", "int4", "", "none"])
def test_an_unknown_value_names_the_allowed_ones(dense, name):
    with pytest.raises(ValueError, match=r"quantization=.*null or one of fp8, torchao, ascend"):
        scheme(name, dense)


def test_the_names_of_the_server_are_those_of_the_schemes():
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    assert set(vllm_async_server._SUPPORTED_QUANTIZATION) == set(SCHEME_NAMES) == {"fp8", "torchao", "ascend"}


def test_none_changes_nothing(dense):
    plain = scheme(None, dense)
    weights = weights_of(dense)
    assert plain.engine_overrides("cpu") == {}
    assert all(a is b for (_, a), b in zip(plain.encode(weights.items()), weights.values(), strict=True))


# ---- ascend ----


def test_ascend_sends_what_an_independent_quantizer_makes(dense):
    weights = weights_of(dense)
    sent = dict(scheme("ascend", dense).encode(weights.items()))
    projections = {name for name in weights if name.endswith("_proj.weight")}
    assert set(sent) == set(weights) | {f"{name}_scale" for name in projections}
    for name, weight in weights.items():
        if name not in projections:
            assert torch.equal(sent[name], weight)
            continue
        values, scales = sent[name], sent[f"{name}_scale"]
        assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.uint8)
        assert scales.shape == (weight.shape[0], -(-weight.shape[1] // 32))
        assert torch.equal(mxfp8_dequantize(values, scales), mxfp8_round_trip(weight))


def relative_error(weight):
    exact, rounded = weight.double(), mxfp8_round_trip(weight).double()
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_report_names_the_weight_that_lost_most(dense, pieces):
    """As an independent quantizer has it, whether the rows were encoded together or by several ranks."""
    weights = weights_of(dense)
    # Just above a power of two, e4m3 is at its worst.
    victim = "model.layers.1.mlp.up_proj.weight"
    weights[victim] = torch.full_like(weights[victim], 1.0625 * 2**-4)
    ranks = [scheme("ascend", dense) for _ in range(pieces)]
    for name, weight in weights.items():
        if not ranks[0].encodes_rows(name):
            continue
        for rank, rows in zip(ranks, weight.chunk(pieces), strict=True):
            rank.encode_weight(name, rows)
    reports = [rank.pop_report().to_message() for rank in ranks]
    error, name = worst_error(merged_errors(reports))
    assert name == max((n for n in weights if n in reports[0]["errors"]), key=lambda n: relative_error(weights[n]))
    assert error == pytest.approx(relative_error(weights[name]), rel=1e-6)
    assert all(report["seconds"] > 0 for report in reports)
    assert worst_error(merged_errors(rank.pop_report().to_message() for rank in ranks)) is None, "it is taken once"
    by_depth = errors_by_depth(merged_errors(reports))
    assert by_depth["mlp.up_proj"][1] == float(f"{error:.3g}") and len(by_depth["mlp.up_proj"]) == 2
    other = relative_error(weights["model.layers.0.self_attn.q_proj.weight"])
    assert by_depth["self_attn.q_proj"][0] == pytest.approx(other, rel=5e-3)


def test_the_worst_error_of_zeros_and_of_nan():
    assert worst_error({"a": [0.0, 0.0], "b": [1.0, 4.0]}) == (0.5, "b")
    error, name = worst_error({"a": [float("nan"), 1.0], "b": [1.0, 4.0]})
    assert name == "a" and error != error


def test_errors_by_depth_take_the_experts_of_a_layer_together():
    experts = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    errors = {
        experts.format(1, 0): [1.0, 100.0],
        experts.format(1, 12): [3.0, 300.0],
        experts.format(3, 0): [0.04, 1.0],
        "model.layers.0.self_attn.q_proj.weight": [1.0, 9.0],
        "lm_head.weight": [0.25, 1.0],
    }
    assert errors_by_depth(errors) == {
        "mlp.experts.up_proj": [None, 0.1, None, 0.2],
        "self_attn.q_proj": [0.333],
        "lm_head": [0.5],
    }


def test_ascend_streams(dense):
    """One tensor in, its pair out: a model is never held twice."""
    drawn = []

    def stream():
        for name, tensor in weights_of(dense).items():
            drawn.append(name)
            yield name, tensor

    for name, _ in scheme("ascend", dense).encode(stream()):
        assert name.removesuffix("_scale") == drawn[-1]


def test_ascend_quantizes_each_expert(experts):
    sent = dict(scheme("ascend", experts).encode(weights_of(experts).items()))
    assert sent["model.layers.1.mlp.experts.3.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert sent["model.layers.1.mlp.experts.3.down_proj.weight_scale"].shape == (64, 2)
    assert sent["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_ascend_describes_every_layer(dense):
    overrides = scheme("ascend", dense).engine_overrides("cpu")
    assert overrides["quantization"] == "ascend"
    description = overrides["hf_overrides"]["quantization_config"]
    assert description["quant_method"] == "ascend"
    assert description["group_size"] == 32
    assert description[Q_PROJ] == "W8A8_MXFP8"
    assert description[EMBEDDING] == "FLOAT"
    assert json.loads(json.dumps(description)) == description


def test_ascend_does_not_run_on_cuda(dense):
    with pytest.raises(ValueError, match=r"quantization=ascend.*not on cuda"):
        scheme("ascend", dense).engine_overrides("cuda")


def test_ascend_on_an_npu_needs_vllm_ascend(dense):
    with pytest.raises(ValueError, match="vllm-ascend is not installed"):
        scheme("ascend", dense).engine_overrides("npu")


def test_ascend_refuses_what_tensor_parallelism_cuts_inside_a_block(dense):
    with pytest.raises(ValueError, match=r"down_proj.*80 inputs, 40 per rank"):
        scheme("ascend", dense, tensor_model_parallel_size=2).engine_overrides("cpu")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path, name):
    directory = write_tiny_model(tmp_path, **FP8_SIZES)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="already quantized"):
        scheme(name, directory).engine_overrides("cpu")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", [Q_PROJ, EMBEDDING])
def test_weights_that_are_not_finite_are_refused_by_name(wide, name, value, weight):
    weights = weights_of(wide)
    weights[weight][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{weight}.*NaN or Inf"):
        list(scheme(name, wide).encode(weights.items()))


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_experts_in_one_tensor_are_refused(tmp_path, name, monkeypatch):
    from safetensors.torch import save_file

    directory = write_tiny_model(tmp_path, kind="qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    weights = weights_of(directory)
    fused = {key: tensor for key, tensor in weights.items() if ".experts." not in key}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        fused[f"{prefix}.gate_up_proj"] = torch.zeros(4, 256, 128)
        fused[f"{prefix}.down_proj"] = torch.zeros(4, 128, 128)
    save_file(fused, directory / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(NotImplementedError, match=r"mlp\.experts\.\w+_proj.*one tensor"):
        scheme(name, directory).engine_overrides("cpu")


# ---- fp8 ----


def test_fp8_sends_scales_of_blocks(wide):
    weights = weights_of(wide)
    sent = dict(scheme("fp8", wide).encode(weights.items()))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (sent[name].dtype, sent[f"{name}_scale_inv"].shape) == (torch.float8_e4m3fn, (2, 2))
    assert sent[f"{name}_scale_inv"].dtype == torch.float32
    assert set(sent) == set(weights) | {f"{key}_scale_inv" for key in weights if key.endswith("_proj.weight")}


def test_fp8_says_how_it_is_started(wide):
    config = scheme("fp8", wide).engine_overrides("cuda")["hf_overrides"]["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    assert config["ignored_layers"] == []


def test_fp8_leaves_routers_out(tmp_path):
    over = dict(hidden_size=128, moe_intermediate_size=128, num_key_value_heads=4)
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", **over)
    config = scheme("fp8", directory).engine_overrides("cuda")["hf_overrides"]["quantization_config"]
    assert config["ignored_layers"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("device", "over", "message"),
    [
        ("npu", {}, "not on an Ascend NPU"),
        ("cuda", {"tensor_model_parallel_size": 4}, r"(down|o)_proj.*inputs|q_proj.*outputs"),
    ],
)
def test_fp8_refuses(wide, device, over, message):
    with pytest.raises(ValueError, match=message):
        scheme("fp8", wide, **over).engine_overrides(device)


def test_fp8_experts_on_a_cpu_without_amx_are_refused(experts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="need a CPU with AMX"):
        scheme("fp8", experts).engine_overrides("cpu")


def test_fp8_refuses_packed_layers_that_end_inside_a_block(dense):
    with pytest.raises(ValueError, match=r"gate_proj \[80, 96\] has 80 outputs"):
        scheme("fp8", dense).engine_overrides("cpu")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_an_engine_cannot_start_from_the_checkpoint(wide, name):
    """It would hold plain weights cast to e4m3, without scales, and say nothing."""
    with pytest.raises(ValueError, match=r"rollout\.load_format=auto: .*use dummy"):
        scheme(name, wide, load_format="auto").engine_overrides("cpu")
    assert scheme(name, wide).engine_overrides("cpu")["quantization"] == name


def test_fp8_refuses_an_engine_in_float32(wide):
    with pytest.raises(ValueError, match=r"rollout\.dtype=float32: .*set actor_rollout_ref\.rollout\.dtype=bfloat16"):
        scheme("fp8", wide, dtype="float32").engine_overrides("cpu")


def test_fp8_takes_no_config_file_yet(wide):
    with pytest.raises(NotImplementedError, match=r"quantization_config_file=x\.json is not supported yet"):
        scheme("fp8", wide, quantization_config_file="x.json").engine_overrides("cpu")


# ---- torchao ----

UNKNOWN = '{"_type": "Int3WeightOnlyConfig", "_version": 2, "_data": {}}'
UNFIT = '{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"groups": 1}}'


@pytest.fixture
def torchao(monkeypatch):
    monkeypatch.syspath_prepend(torchao_directory())


def test_torchao_needs_its_file(dense):
    with pytest.raises(ValueError, match=r"needs actor_rollout_ref\.rollout\.quantization_config_file"):
        scheme("torchao", dense).engine_overrides("cpu")


def test_torchao_has_to_be_installed(dense, monkeypatch):
    from verl.workers.rollout.quantization import torchao

    monkeypatch.setattr(torchao, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao is not installed"):
        scheme("torchao", dense, quantization_config_file="x.json").engine_overrides("cpu")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", UNKNOWN, UNFIT])
def test_torchao_refuses_a_damaged_file(dense, torchao, tmp_path, content):
    path = tmp_path / "torchao.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"quantization_config_file=.*torchao\.json"):
        scheme("torchao", dense, quantization_config_file=str(path)).engine_overrides("cpu")


def test_torchao_hands_its_file_on(dense, torchao, tmp_path):
    path = tmp_path / "torchao.json"
    path.write_text(json.dumps({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}))
    overrides = scheme("torchao", dense, quantization_config_file=str(path)).engine_overrides("cpu")
    assert overrides == {"quantization": "torchao", "hf_overrides": {"quantization_config_file": str(path)}}


# ---- what a receiver checks ----


def specs(*entries):
    return {name: TensorSpec(name, shape, dtype) for name, shape, dtype in entries}


SCALED = ScaledWeights("_scale", "uint8", lambda shape: (*shape[:-1], -(-shape[-1] // 32)))
WEIGHT = ("a.weight", (6, 80), "float8_e4m3fn")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (("a.weight_scale", (6, 4), "uint8"), r"'a\.weight_scale'.*\[6, 4\].*\[6, 3\]"),
        (("a.weight_scale", (6, 2), "uint8"), r"'a\.weight_scale'.*\[6, 2\].*\[6, 3\]"),
        (("a.weight_scale", (3, 6), "uint8"), r"'a\.weight_scale'.*\[3, 6\].*\[6, 3\]"),
        (("a.weight_scale", (6, 3), "float32"), r"'a\.weight_scale'.*uint8.*float32"),
    ],
)
def test_scales_that_do_not_fit_are_refused_whichever_comes_first(scale, message):
    both = specs(WEIGHT, scale)
    with pytest.raises(WeightUpdateError, match=message):
        SCALED.check_pair("a.weight_scale", both)
    if scale[2] == "uint8":
        with pytest.raises(WeightUpdateError, match=message):
            SCALED.check_pair("a.weight", both)


def test_a_plain_weight_with_scales_is_refused():
    with pytest.raises(WeightUpdateError, match=r"'a\.weight': bfloat16 with scales"):
        SCALED.check_pair("a.weight", specs(("a.weight", (6, 80), "bfloat16"), ("a.weight_scale", (6, 3), "uint8")))


def test_what_fits_is_not_refused():
    whole = specs(WEIGHT, ("a.weight_scale", (6, 3), "uint8"), ("norm.weight", (6,), "bfloat16"))
    for name in whole:
        SCALED.check_pair(name, whole)
    SCALED.check_complete(whole)


@pytest.mark.parametrize("left", [WEIGHT, ("a.weight_scale", (6, 3), "uint8")], ids=["weight", "scale"])
def test_half_a_pair_is_refused(left):
    with pytest.raises(WeightUpdateError, match=r"'a\.weight.*did not arrive"):
        SCALED.check_complete(specs(left))


def test_the_class_alone_serves_the_workers():
    nan = torch.tensor([[1, 255]], dtype=torch.uint8)
    arrived = specs(("a.weight_scale", (1, 2), "uint8"))
    with pytest.raises(WeightUpdateError, match=r"'a\.weight_scale'.*NaN"):
        scheme_class("ascend").check_tensor("a.weight_scale", nan, arrived)
