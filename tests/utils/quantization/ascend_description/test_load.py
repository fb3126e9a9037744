"""Descriptions from files: ModelSlim's, the one of the model directory, and `ignore` lists."""

import json
import re

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description, load_description, resolve_description

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


def modelslim(directory):
    """Return a description like ModelSlim's: every tensor, all experts, no quant_method."""
    index = build_description(directory)
    entries = {name: MX if index.is_quantized(name) else FLOAT for name in index.parameters}
    return {"model_quant_type": MX, "version": "1.0.0", "group_size": 32, **entries}


def given_file(directory, change):
    """Write `modelslim` with some entries replaced; None removes an entry."""
    entries = {key: value for key, value in (modelslim(directory) | change).items() if value is not None}
    path = directory / "given.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("fixture", ["dense", "moe"])
def test_given_description_is_used(request, tmp_path, fixture):
    directory = request.getfixturevalue(fixture)
    given = modelslim(directory)
    given["model.layers.0.self_attn.o_proj.weight"] = FLOAT
    path = tmp_path / "given.json"
    path.write_text(json.dumps(given))
    description = resolve_description(directory, path)
    expected = build_description(directory, ignore=["model.layers.0.self_attn.o_proj"])
    assert description.to_json_dict() == expected.to_json_dict()
    assert description.quantized_layers == expected.quantized_layers
    own = directory / "quant_model_description.json"
    own.write_text(json.dumps(expected.to_json_dict()))
    assert resolve_description(directory).to_json_dict() == expected.to_json_dict()
    path.write_text('{"ignore": []}')
    assert len(resolve_description(directory, path).quantized_layers) == len(expected.quantized_layers) + 1
    own.unlink()
    assert resolve_description(directory).to_json_dict() == build_description(directory).to_json_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.9.mlp.up_proj.weight": MX},
            r"1 of its \d+ layers are not in .*layers.9.mlp.up_proj.*another model",
        ),
        ({"model.layers.0.mlp.down_proj.weight": None}, r"down_proj \[64, 128\] is not described: add 'model.layers.0"),
        (
            {"model.layers.0.mlp.down_proj.weight": "W8A8_DYNAMIC"},
            "down_proj.weight is 'W8A8_DYNAMIC'; only W8A8_MXFP8, W4A8_MXFP and FLOAT",
        ),
        ({"model.layers.0.mlp.up_proj.weight": FLOAT}, "gate_proj,up_proj.*must be alike"),
        ({"lm_head.weight": MX}, r"lm_head \[128, 64\] is W8A8_MXFP8, but cannot be \(output head\)"),
        ({"model.norm.weight": MX}, r"cannot be \(vector\)"),
        ({"group_size": 64}, "group_size=64 is not supported: must be 32"),
        ({"quant_method": "fp8"}, "quant_method='fp8'"),
        ({"fa_quant_type": "FAKQuant"}, "fa_quant_type='FAKQuant': quantized KV caches are not supported"),
        ({"model.layers.0.self_attn.k_proj.kv_cache_scale": FLOAT}, "quantized KV caches are not supported"),
        ({"default_quant_type": MX}, "unknown field default_quant_type"),
        ({"is_rot_used": True}, "unknown field is_rot_used=True"),
        *(
            ({name: value}, f"{name}={re.escape(repr(value))} is not supported: must be")
            for name in ("group_size", "quant_method", "model_quant_type")
            for value in ([32], {"a": 1}, True, 3, float("nan"))
        ),
        *(
            ({"model.layers.0.mlp.down_proj.weight": value}, "down_proj.weight is .*; only W8A8_MXFP8")
            for value in ([MX], {"a": 1}, 8, True, float("nan"))
        ),
        ({"..": MX}, "unknown field ..='W8A8_MXFP8'; remove it"),
    ],
)
def test_given_description_that_does_not_fit_is_rejected(dense, change, message):
    with pytest.raises(ValueError, match=message):
        load_description(given_file(dense, change), dense)


def test_given_description_of_some_experts_is_rejected(moe):
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts: the engine packs these 12"):
        load_description(given_file(moe, {"model.layers.1.mlp.experts.3.up_proj.weight": FLOAT}), moe)


def test_given_description_is_checked_for_the_parallel_size(dense):
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=8.*down_proj"):
        load_description(given_file(dense, {}), dense, tp_size=8)


def test_given_description_may_quantize_unknown_layers(tmp_path):
    config, tensors = small_decoder()
    tensors["model.layers.0.linear_attn.out_proj.weight"] = ((64, 96), "BF16")
    directory = write_header_checkpoint(tmp_path, config, tensors)
    path = given_file(directory, {"model.layers.0.linear_attn.out_proj.weight": MX})
    assert load_description(path, directory).is_quantized("model.layers.0.linear_attn.out_proj.weight")
    with pytest.raises(ValueError, match=r"out_proj \[64, 96\].*not know how.*96 inputs.*tensor_model_parallel_size=2"):
        load_description(path, directory, tp_size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ignore": ["lm_head"', "damaged JSON at line 1, column"),
        ("", "the file is empty; correct the file"),
        ("null", "holds a JSON NoneType, expected an object; correct"),
        ('{"ignore": ["lm_head"], "ignore": []}', "the key 'ignore' stands twice"),
        ('{"a.b.weight": "FLOAT", "a.b.weight": "W8A8_MXFP8"}', "the key 'a.b.weight' stands twice"),
        ('{"group_size": ' + "9" * 5000 + "}", "4300 digits"),
        ("[]", "holds a JSON list, expected an object"),
        ('{"ignore": "lm_head"}', "ignore='lm_head', expected a list"),
        ('{"ignore": [], "group_size": 32}', "has group_size next to 'ignore'"),
        ('{"quant_method": "ascend"}', "describes no layer"),
        ("\xff\xfe", "not a UTF-8 text file"),
        (None, "no such file"),
    ],
)
def test_damaged_file_is_rejected(dense, tmp_path, text, message):
    path = tmp_path / "description.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        resolve_description(dense, path)


def test_schemes_are_mixed_by_layer(dense):
    change = {f"model.layers.0.self_attn.{name}_proj.weight": "W4A8_MXFP" for name in "qkv"}
    change["model.layers.1.mlp.down_proj.weight"] = "W4A8_MXFP"
    description = load_description(given_file(dense, change), dense)
    entries = description.to_json_dict()
    assert {key for key, value in entries.items() if value == "W4A8_MXFP"} == set(change)
    assert entries["model.layers.0.mlp.down_proj.weight"] == MX and entries["model_quant_type"] == MX
    assert description.schemes == (MX, "W4A8_MXFP") and description.weight_formats == "MXFP8 and MXFP4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.0.self_attn.k_proj.weight": "W4A8_MXFP"},
            r"q_proj,k_proj,v_proj.*: \S+q_proj is W8A8_MXFP8, \S+k_proj is W4A8_MXFP; give them one value",
        ),
        ({"model.layers.1.mlp.up_proj.weight": "W4A8_MXFP"}, r"gate_proj,up_proj.*up_proj is W4A8_MXFP"),
        ({"lm_head.weight": "W4A8_MXFP"}, r"lm_head \[128, 64\] is W4A8_MXFP, but cannot be"),
    ],
)
def test_mixed_shards_of_a_packed_layer_are_rejected(dense, change, message):
    with pytest.raises(ValueError, match=message):
        load_description(given_file(dense, change), dense)


def test_mixed_experts_are_rejected(moe):
    file = given_file(moe, {"model.layers.1.mlp.experts.3.up_proj.weight": "W4A8_MXFP"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts: the engine packs these 12 .*3.up_proj is W4A8_MXFP"):
        load_description(file, moe)


@pytest.mark.parametrize(("inputs", "tp_size"), [(96, 1), (80, 1), (192, 2)])
def test_mxfp4_inputs_that_are_no_multiple_of_64_are_rejected(tmp_path, inputs, tp_size):
    directory = write_header_checkpoint(tmp_path, *small_decoder(intermediate_size=inputs))
    file = given_file(directory, {f"model.layers.{layer}.mlp.down_proj.weight": "W4A8_MXFP" for layer in (0, 1)})
    smaller = "use tensor_model_parallel_size=1, or " if tp_size > 1 else ""
    message = (
        rf"down_proj \[64, {inputs}\] has {inputs // tp_size} inputs on a rank .*of 64 only: {smaller}give it another"
    )
    with pytest.raises(ValueError, match=message):
        load_description(file, directory, tp_size=tp_size)


def test_scheme_beside_a_description_of_the_model_is_rejected(dense):
    own = dense / "quant_model_description.json"
    own.write_text(json.dumps(build_description(dense).to_json_dict()))
    with pytest.raises(ValueError, match=r"quantization_scheme=W4A8_MXFP: .*quant_model_description.json already"):
        resolve_description(dense, scheme="W4A8_MXFP")
    own.unlink()
    assert resolve_description(dense, scheme="W4A8_MXFP").schemes == ("W4A8_MXFP",)
    assert resolve_description(dense).schemes == (MX,)
