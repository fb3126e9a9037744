"""What the description refuses, and descriptions that users give."""

import json
import re

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description, load_description, main, resolve_description

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


@pytest.fixture
def dense(tmp_path):
    return write_header_checkpoint(tmp_path / "dense", *small_decoder())


@pytest.fixture
def moe(tmp_path):
    return write_header_checkpoint(tmp_path / "moe", *small_decoder(experts=4))


def test_outputs_of_attention_are_cut_along_their_inputs(tmp_path):
    """o_proj has 64 inputs, down_proj 128: four ranks have 16 and 32."""
    directory = write_header_checkpoint(tmp_path, *small_decoder())
    with pytest.raises(
        ValueError, match=r"self_attn.o_proj \[64, 64\] \(2 such\) has 64 inputs, 16 per rank"
    ) as refused:
        build_description(directory, tp_size=4)
    assert "down_proj" not in str(refused.value)


def test_column_parallel_inputs_need_not_divide(tmp_path):
    """Only down_proj is cut along its inputs, here 128 / 2; hidden_size 80 is no multiple of 32."""
    directory = write_header_checkpoint(tmp_path, *small_decoder(hidden_size=80))
    assert len(build_description(directory, tp_size=2).quantized_layers) == 14


@pytest.mark.parametrize(
    ("ignore", "packed", "culprit"),
    [
        ("model.layers.1.self_attn.k_proj", r"q_proj,k_proj,v_proj", "model.layers.1.self_attn.k_proj is not"),
        (r"re:.*\.up_proj", r"gate_proj,up_proj", "model.layers.0.mlp.up_proj is not"),
    ],
)
def test_mixed_shards_of_a_packed_layer(dense, ignore, packed, culprit):
    with pytest.raises(ValueError, match=rf"\{{{packed}\}}.*{re.escape(culprit)}.*all of them or none"):
        build_description(dense, ignore=[ignore])


@pytest.mark.parametrize("ignore", [r"re:.*\.1\.mlp\.experts\.2\..*", r"re:.*experts.*down_proj"])
def test_mixed_experts(moe, ignore):
    with pytest.raises(ValueError, match=r"model.layers.\d.mlp.experts: the engine packs these 12 layers"):
        build_description(moe, ignore=[ignore])


def test_ignore_takes_names_and_patterns(dense):
    description = build_description(
        dense, ignore=["lm_head", "model.layers.0.mlp.down_proj", r"re:.*\.1\.self_attn\..*_proj"]
    )
    kept = set(build_description(dense).quantized_layers) - set(description.quantized_layers)
    assert kept == {"model.layers.0.mlp.down_proj", *(f"model.layers.1.self_attn.{n}_proj" for n in "qkvo")}
    assert description.to_json_dict()["model.layers.0.mlp.down_proj.weight"] == FLOAT
    assert not description.is_quantized("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(
    "pattern", ["model.layers.0.mlp.down_prj", "down_proj", r"re:\.down_proj", r"re:.*mlp\.gate", "re:model.layers.7.*"]
)
def test_ignore_that_matches_nothing(dense, pattern):
    with pytest.raises(ValueError, match=rf"ignore {re.escape(repr(pattern))}: matches no layer"):
        build_description(dense, ignore=[pattern])


def test_ignore_that_is_no_regular_expression(dense):
    with pytest.raises(ValueError, match="not a regular expression"):
        build_description(dense, ignore=["re:*down"])


def test_everything_ignored(dense):
    with pytest.raises(ValueError, match="no layer is left to quantize"):
        build_description(dense, ignore=["re:.*"])


def test_a_name_that_starts_with_anothers(tmp_path):
    """A FLOAT `o_proj_extra` would switch `o_proj` off in vllm-ascend, which compares with startswith."""
    config, tensors = small_decoder()
    tensors["model.layers.1.self_attn.o_proj_extra.weight"] = ((64, 64), "BF16")
    directory = write_header_checkpoint(tmp_path, config, tensors)
    with pytest.raises(
        ValueError, match=r"1.self_attn.o_proj is quantized and model.layers.1.self_attn.o_proj_extra is not"
    ):
        build_description(directory)
    build_description(directory, ignore=["model.layers.1.self_attn.o_proj"])


def test_router_whose_name_a_projections_starts_with(tmp_path, dense):
    description = build_description(dense).to_json_dict()
    config, tensors = small_decoder()
    tensors["model.layers.0.mlp.gate.weight"] = ((4, 64), "BF16")
    directory = write_header_checkpoint(tmp_path / "gate", config, tensors)
    for name in ("gate_proj", "up_proj"):
        description[f"model.layers.0.mlp.{name}.weight"] = FLOAT
    path = tmp_path / "description.json"
    path.write_text(json.dumps(description | {"model.layers.0.mlp.gate.weight": MX}))
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate is quantized and model.layers.0.mlp.gate_proj is not"):
        load_description(path, directory)
    path.write_text(json.dumps(description | {"model.layers.0.mlp.gate.weight": FLOAT}))
    assert load_description(path, directory).to_json_dict()["model.layers.0.mlp.gate.weight"] == FLOAT


@pytest.mark.parametrize(
    ("name", "dtype", "config", "evidence"),
    [
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", {}, "up_proj.weight is F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight", "I8", {}, "up_proj.weight is I8"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "F32", {}, "weight_scale_inv is F32"),
        ("model.norm.bias", "BF16", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ("model.norm.bias", "BF16", {"text_config": {"quantization_config": {"bits": 4}}}, "quantization_config"),
    ],
)
def test_a_checkpoint_that_is_already_quantized(tmp_path, name, dtype, config, evidence):
    own, tensors = small_decoder()
    directory = write_header_checkpoint(tmp_path, own | config, tensors | {name: ((128, 64), dtype)})
    with pytest.raises(ValueError, match=f"already quantized: .*{evidence}.*needs the BF16 checkpoint"):
        build_description(directory)


def test_a_checkpoint_that_lacks_layers(tmp_path):
    config, tensors = small_decoder()
    directory = write_header_checkpoint(tmp_path, config | {"num_hidden_layers": 3}, tensors)
    with pytest.raises(ValueError, match=r"num_hidden_layers=3, the checkpoint has no model.layers.2"):
        build_description(directory)


def test_a_model_without_a_known_decoder(tmp_path):
    directory = write_header_checkpoint(tmp_path, {"model_type": "gpt2"}, {"wte.weight": ((8, 4), "F32")})
    with pytest.raises(ValueError, match=r"models of type 'gpt2' are not supported in MXFP8"):
        build_description(directory)


def test_unknown_layers_stay_unquantized_and_are_listed(tmp_path):
    config, tensors = small_decoder()
    tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"] = ((256, 64), "BF16")
    description = build_description(write_header_checkpoint(tmp_path, config, tensors))
    assert not description.is_quantized("model.layers.0.linear_attn.in_proj_qkvz.weight")
    assert re.search(r"in_proj_qkvz +1 +256 x 64 .*unknown kind of layer", description.table())
    assert "Warning: 1 layers are of a kind" in description.table()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("h", "i"), [(64, 96), (64, 32), (64, 64)])
def test_fused_experts(tmp_path, h, i, transposed):
    """Square ones too, where one of the two tensors fits both ways."""
    config, tensors = small_decoder(experts=4, hidden_size=h)
    config |= {"intermediate_size": 128, "moe_intermediate_size": i}
    tensors = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        tensors[f"{stem}.gate_up_proj"] = ((4, h, 2 * i) if transposed else (4, 2 * i, h), "BF16")
        tensors[f"{stem}.down_proj"] = ((4, i, h) if transposed else (4, h, i), "BF16")
    description = build_description(write_header_checkpoint(tmp_path, config, tensors))
    gate_up = description.layer("model.layers.1.mlp.experts.gate_up_proj")
    down = description.layer("model.layers.1.mlp.experts.down_proj")
    assert (gate_up.k, down.k) == (h, i)
    assert gate_up.nbytes_after == 4 * 2 * i * (h + h // 32)
    assert gate_up.axis == down.axis == (-2 if transposed else -1)
    layers = description.to_json_dict()
    for name in ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj", "experts"):
        assert layers[f"model.layers.1.mlp.{name}.weight"] == MX
    assert "model.layers.1.mlp.experts.gate_up_proj.weight" not in layers
    with pytest.raises(ValueError, match="the engine packs these 2 layers into one"):
        build_description(tmp_path, ignore=["model.layers.1.mlp.experts.down_proj"])


def test_fused_experts_that_the_config_does_not_explain(tmp_path):
    config, tensors = small_decoder(experts=4)
    tensors = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ((4, 100, 64), "BF16")
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = ((4, 64, 50), "BF16")
    with pytest.raises(ValueError, match=r"gate_up_proj \(4, 100, 64\) .* do not fit hidden_size=64"):
        build_description(write_header_checkpoint(tmp_path, config, tensors))


def modelslim(directory):
    """As ModelSlim writes it: every tensor listed, all experts, no quant_method."""
    index = build_description(directory)
    entries = {name: MX if index.is_quantized(name) else FLOAT for name in index.parameters}
    return {"model_quant_type": MX, "version": "1.0.0", "group_size": 32, **entries}


@pytest.mark.parametrize("fixture", ["dense", "moe"])
def test_a_given_description_is_used(request, tmp_path, fixture):
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


def given_file(directory, change):
    """`modelslim` with entries replaced; None removes one."""
    entries = {key: value for key, value in (modelslim(directory) | change).items() if value is not None}
    path = directory / "given.json"
    path.write_text(json.dumps(entries))
    return path


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
            "down_proj.weight is 'W8A8_DYNAMIC'; only W8A8_MXFP8 and",
        ),
        ({"model.layers.0.mlp.up_proj.weight": FLOAT}, "gate_proj,up_proj.*must be alike"),
        ({"lm_head.weight": MX}, r"lm_head \[128, 64\] is W8A8_MXFP8, but cannot be \(output head\)"),
        ({"model.norm.weight": MX}, r"cannot be \(vector\)"),
        ({"group_size": 64}, "group_size=64 is not supported: MXFP8 needs 32"),
        ({"quant_method": "fp8"}, "quant_method='fp8'"),
        ({"fa_quant_type": "FAKQuant"}, "fa_quant_type='FAKQuant': quantized KV caches are not supported"),
        ({"model.layers.0.self_attn.k_proj.kv_cache_scale": FLOAT}, "quantized KV caches are not supported"),
        ({"default_quant_type": MX}, "unknown field default_quant_type"),
        ({"is_rot_used": True}, "unknown field is_rot_used=True"),
    ],
)
def test_a_given_description_that_does_not_fit(dense, change, message):
    with pytest.raises(ValueError, match=message):
        load_description(given_file(dense, change), dense)


def test_a_given_description_of_some_experts(moe):
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts: the engine packs these 12"):
        load_description(given_file(moe, {"model.layers.1.mlp.experts.3.up_proj.weight": FLOAT}), moe)


def test_a_given_description_is_checked_for_the_parallel_size(dense):
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=8.*down_proj"):
        load_description(given_file(dense, {}), dense, tp_size=8)


def test_a_given_description_may_quantize_what_is_not_known_here(tmp_path):
    config, tensors = small_decoder()
    tensors["model.layers.0.linear_attn.out_proj.weight"] = ((64, 96), "BF16")
    directory = write_header_checkpoint(tmp_path, config, tensors)
    path = given_file(directory, {"model.layers.0.linear_attn.out_proj.weight": MX})
    assert load_description(path, directory).is_quantized("model.layers.0.linear_attn.out_proj.weight")
    with pytest.raises(
        ValueError, match=r"out_proj \[64, 96\].*not known how.*96 inputs.*tensor_model_parallel_size=2"
    ):
        load_description(path, directory, tp_size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ignore": ["lm_head"', "damaged JSON at line 1, column"),
        ("[]", "holds a JSON list, expected an object"),
        ('{"ignore": "lm_head"}', "ignore='lm_head', expected a list"),
        ('{"ignore": [], "group_size": 32}', "has group_size besides 'ignore'"),
        ('{"quant_method": "ascend"}', "describes no layer"),
        ("\xff\xfe", "not a UTF-8 text file"),
        (None, "no such file"),
    ],
)
def test_a_damaged_file(dense, tmp_path, text, message):
    path = tmp_path / "description.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        resolve_description(dense, path)


def test_command_line_refuses_in_one_line(dense, tmp_path, capsys):
    assert main([str(dense), "--ignore", "nothing", "-o", str(tmp_path / "out.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ignore 'nothing': matches no layer") and captured.err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
