"""Units of layers that must have the same precision."""

import json

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description import load_description
from verl.utils.quantization.ascend_description.units import read_units

W8, W4 = "W8A8_MXFP8", "W4A8_MXFP"
QKV, GATE_UP = "self_attn.{q_proj,k_proj,v_proj}", "mlp.{gate_proj,up_proj}"


def names_of(units, layer=0):
    return {unit.name.removeprefix(f"model.layers.{layer}.") for unit in units.units if unit.depth == layer}


def test_projections_that_the_engine_packs_are_one_unit(dense):
    units = read_units(read_checkpoint_index(dense), [W8])
    assert len(units.units) == 8 and not units.unfit
    assert names_of(units) == names_of(units, 1) == {QKV, "self_attn.o_proj", GATE_UP, "mlp.down_proj"}
    unit = next(unit for unit in units.units if unit.name == f"model.layers.1.{QKV}")
    assert unit.weights == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"}
    # Three weights of 64 x 64: 2 bytes each become 1 byte and one scale byte for 32.
    assert unit.saved == {W8: 3 * 64 * 64 * 2 - 3 * (64 * 64 + 64 * 2)}


def test_all_experts_of_a_layer_are_one_unit(moe):
    units = read_units(read_checkpoint_index(moe), [W8])
    assert names_of(units) == {QKV, "self_attn.o_proj", "mlp.experts"}
    experts = next(unit for unit in units.units if unit.name == "model.layers.0.mlp.experts")
    assert len(experts.weights) == 3 * 4


def test_layers_that_tensor_parallelism_cuts_inside_a_block_stay_unquantized(tmp_path):
    model = write_header_checkpoint(tmp_path / "model", *small_decoder(intermediate_size=160))
    units = read_units(read_checkpoint_index(model), [W8], tp_size=2)
    assert set(units.unfit) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert names_of(units) == {QKV, "self_attn.o_proj", GATE_UP}
    description = units.describe({unit.name: W8 for unit in units.units})
    reasons = {layer.reason for layer in description.layers if layer.name.endswith("down_proj")}
    assert reasons == {"sizes that the engine cannot hold"}


def test_each_unit_has_the_schemes_that_fit(tmp_path):
    """W4A8_MXFP takes inputs in multiples of 64 only."""
    model = write_header_checkpoint(tmp_path / "model", *small_decoder(intermediate_size=160))
    schemes = {unit.name: set(unit.saved) for unit in read_units(read_checkpoint_index(model), [W4, W8]).units}
    assert schemes["model.layers.0.mlp.down_proj"] == {W8} and schemes[f"model.layers.0.{GATE_UP}"] == {W4, W8}


def test_written_description_has_the_chosen_layers(moe, tmp_path):
    units = read_units(read_checkpoint_index(moe), [W4, W8])
    chosen = {f"model.layers.1.{QKV}": W8, "model.layers.0.mlp.experts": W4}
    file = tmp_path / "description.json"
    file.write_text(json.dumps(units.describe(chosen).to_json_dict()))
    loaded = load_description(file, moe)
    found = {layer.name: layer.scheme for layer in loaded.layers if layer.quantized}
    expected = {f"model.layers.1.self_attn.{name}_proj": W8 for name in "qkv"}
    expected |= {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj": W4 for expert in range(4) for name in ("gate", "up", "down")
    }
    assert found == expected


def test_bytes_of_an_unquantized_engine(tmp_path):
    config, tensors = small_decoder()
    model = write_header_checkpoint(
        tmp_path / "model", config, {name: (shape, "F32") for name, (shape, _) in tensors.items()}
    )
    units = read_units(read_checkpoint_index(model), [W8])
    elements = 2 * 128 * 64 + 64 + 2 * (4 * 64 * 64 + 64 + 3 * 64 * 128)
    assert units.unquantized_nbytes == 2 * elements


def test_layers_of_ignore_are_no_units(dense):
    units = read_units(read_checkpoint_index(dense), [W8], ignore=["re:.*\\.o_proj"])
    assert names_of(units) == {QKV, GATE_UP, "mlp.down_proj"}


def test_model_without_a_layer_that_fits_is_rejected(tmp_path):
    model = write_header_checkpoint(tmp_path / "model", *small_decoder())
    ignore = ["re:.*(q|k|v|o|gate|up)_proj"]
    with pytest.raises(ValueError, match=r"down_proj \[64, 128\].*use tensor_model_parallel_size=1 or 2"):
        read_units(read_checkpoint_index(model), [W8], tp_size=8, ignore=ignore)
