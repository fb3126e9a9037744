"""W4A8_MXFP with the release's own scheme: weights in MXFP4, which the release holds in FRACTAL_NZ."""

import functools
import json
import re

import numpy as np
import pytest
import torch
import torch_npu
from contract.vllm_ascend import ranks
from contract.vllm_ascend.forward import complete_experts
from contract.vllm_ascend.harness import RELEASE, build_model, engine, make_vllm_config, schemes
from contract.vllm_ascend.products import assert_dense_outputs, assert_expert_products, assert_linear_products
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of, rounded_fp4
from contract.vllm_ascend.updates import (
    Updates,
    addresses,
    assert_every_delta_lands,
    checkpoints,
    config_of,
    scheme_of,
    weights_of,
)
from safetensors.torch import save_file

from fixtures.fake_quant import fake_quantized, mxfp4_round_trip
from fixtures.ranks import run_ranks
from verl.utils.quantization.ascend_releases import validate_mxfp4
from verl.workers.rollout.quantization.mxfp4_layers import (
    check_mxfp4_kernel_layouts,
    mxfp4_layers,
    restore_mxfp4_weights_for_loading,
)
from verl.workers.rollout.quantization.mxfp4_self_test import run_mxfp4_self_test
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.feature("mxfp4")

FRACTAL_NZ_C0_16 = 50
W4A8 = {"quantization_scheme": "W4A8_MXFP"}
OLD = RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1")
replaceable = pytest.mark.skipif(OLD, reason="verl refuses W4A8_MXFP before 0.28")
KINDS = pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])


def fp4(name):
    return True


def built(first, **over):
    config = config_of(first, **W4A8)
    return config, scheme_of(first, **W4A8)


@replaceable
@KINDS
def test_release_moves_the_weights(tmp_path, kind):
    """The reason for the hooks: its own restore and transformation make new tensors."""
    first, second = checkpoints(tmp_path, kind, 2)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        weights = {
            name: p.data for name, p in model.named_parameters() if name.endswith("weight") and p.dtype == torch.uint8
        }
        assert weights
        for layer in mxfp4_layers(model).values():
            layer.quant_method.quant_method.restore_weights_for_rl_loading(layer)
        model.load_weights(scheme.encode(weights_of(second).items()))
        for layer in mxfp4_layers(model).values():
            layer.quant_method.process_weights_after_loading(layer)
        assert_same(parameters_of(model), engine_parameters(weights_of(second), fp4=fp4))
        parameters = dict(model.named_parameters())
        assert all(parameters[name].data_ptr() != weight.data_ptr() for name, weight in weights.items())


@replaceable
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@KINDS
def test_every_update_writes_the_expected_bytes_at_the_same_addresses(tmp_path, kind, tied):
    first, *others = checkpoints(tmp_path, kind, tied=tied)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        check_mxfp4_kernel_layouts(model)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first, others[0]]:
            updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source), fp4=fp4))
            assert addresses(model) == before
            found = {
                torch_npu.get_npu_format(p.data) for p in model.parameters() if p.dtype == torch.uint8 and p.ndim < 4
            }
            assert FRACTAL_NZ_C0_16 in found


@replaceable
@KINDS
def test_update_equals_a_load_of_the_release(tmp_path, kind):
    """vLLM loads an encoded checkpoint by itself; the memory of every parameter is the same, blocks included."""
    first, second = checkpoints(tmp_path, kind, 2)
    config, scheme = built(first)

    def memory(model):
        return {
            name: (torch_npu.get_npu_format(p.data), p.data.untyped_storage().tolist())
            for name, p in model.named_parameters()
            if p.dtype == torch.uint8
        }

    with engine(config):
        model = build_model(config)
        Updates(model, config, scheme).send(weights_of(second))
        updated = memory(model)
    save_file(
        {name: tensor.contiguous() for name, tensor in scheme.encode(weights_of(second).items())},
        second / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = make_vllm_config(second, scheme.format.description.to_json_dict())
    with engine(config):
        assert memory(build_model(config)) == updated


@replaceable
@KINDS
def test_delta_leaves_the_bytes_of_a_full_update(tmp_path, kind):
    (source,) = checkpoints(tmp_path, kind, 1, tied=kind == "qwen3")
    assert_every_delta_lands(source, fp4=fp4, **W4A8)


@replaceable
@KINDS
def test_schemes_are_mixed_by_layer(tmp_path, kind):
    """Attention of one layer in MXFP8, one down_proj or the experts of one layer unquantized, the rest in MXFP4."""
    first, *others = checkpoints(tmp_path, kind, 4)
    plain = "layers.0.mlp.experts" if kind == "qwen3_moe" else "layers.0.mlp.down_proj"
    entries = scheme_of(first, **W4A8).format.description.to_json_dict()
    for key in [key for key, value in entries.items() if value == "W4A8_MXFP" and "." in key]:
        if "layers.1.self_attn" in key:
            entries[key] = "W8A8_MXFP8"
        elif plain in key:
            entries[key] = "FLOAT"
    file = tmp_path / "description.json"
    file.write_text(json.dumps(entries))
    config = config_of(first, quantization_config_file=str(file))
    scheme = scheme_of(first, quantization_config_file=str(file))
    with engine(config):
        model = build_model(config)
        assert len(mxfp4_layers(model)) < len([name for name in schemes(model).values() if "MXFP" in name])
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first, others[0]]:
            updates.send(weights_of(source))
            expected = engine_parameters(
                weights_of(source), left_out=(plain,), fp4=lambda name: "layers.1.self_attn" not in name
            )
            if kind == "qwen3_moe":
                for name in ("w13_weight", "w2_weight"):
                    key = f"model.layers.0.mlp.experts.{name}"
                    expected[key] = np.swapaxes(expected[key], 1, 2)
            assert_same(parameters_of(model), expected)
            assert addresses(model) == before


@replaceable
def test_linear_layers_after_every_update(tmp_path):
    assert_linear_products(checkpoints(tmp_path, "qwen3"), mxfp4_layers, rounded_fp4, **W4A8)


@replaceable
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_dense_model_equals_a_fake_quantized_one(tmp_path, kind):
    reference = functools.partial(fake_quantized, weights=lambda name: mxfp4_round_trip)
    assert_dense_outputs(checkpoints(tmp_path, kind, std=0.02), reference, **W4A8)


@replaceable
def test_experts_after_every_update(tmp_path):
    """The release rounds the first product to bfloat16."""

    def in_bfloat16(product):
        return torch.from_numpy(product).bfloat16().double().numpy()

    assert_expert_products(checkpoints(tmp_path, "qwen3_moe"), rounded_fp4, in_bfloat16, **W4A8)


@replaceable
@pytest.mark.parametrize(("kind", "over"), [("qwen3", {}), ("qwen3_moe", {"moe_intermediate_size": 128})])
def test_each_rank_holds_its_share(tmp_path, kind, over):
    sources = checkpoints(tmp_path, kind, 4, hidden_size=128, intermediate_size=256, **over)
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    for message in run_ranks(2, ranks.update, 2, sources, name, "W4A8_MXFP"):
        assert re.search(rf"{re.escape(name)}.*not padded", message)


@replaceable
def test_padded_memory_is_refused(tmp_path):
    """qkv_proj has 72 outputs, which blocks of 16 rows pad."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 4}
    (first,) = checkpoints(tmp_path, "qwen3", 1, **sizes)
    config, scheme = built(first)
    with pytest.raises(ValueError, match=r"k_proj \[4, 64\] is W4A8_MXFP and has 4 outputs .* multiple of 16"):
        validate_mxfp4(scheme.format.layers, 1, RELEASE)
    with engine(config):
        model = build_model(config)
        message = r"qkv_proj\.weight: 72 outputs take 2560 bytes for 2304, so its memory is padded"
        with pytest.raises(RuntimeError, match=message):
            check_mxfp4_kernel_layouts(model)


@replaceable
def test_format_that_an_update_changes_is_refused(tmp_path):
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme)
        own = model.get_submodule("model.layers.1.mlp.down_proj").quant_method.quant_method
        process = own.process_weights_after_loading

        def casting_back(layer):
            process(layer)
            layer.weight.data = torch_npu.npu_format_cast(layer.weight.data.transpose(-1, -2), 2).transpose(-1, -2)

        own.process_weights_after_loading = casting_back
        message = (
            r"model\.layers\.1\.mlp\.down_proj\.weight: its memory format became .* \(2\), the first load made .*50"
        )
        with pytest.raises(RuntimeError, match=message):
            updates.send(weights_of(second))


@replaceable
def test_moved_weights_are_refused(tmp_path):
    (first,) = checkpoints(tmp_path, "qwen3", 1)
    config, _ = built(first)
    with engine(config):
        model = build_model(config)
        check_mxfp4_kernel_layouts(model)
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        layer.weight.data = layer.weight.data.clone()
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: its memory was replaced"):
            restore_mxfp4_weights_for_loading(model)


@replaceable
def test_other_weights_in_nz_are_refused(tmp_path):
    """Only weights in MXFP4 may have this format; here a scale gets it."""
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        norm = model.get_submodule("model.embed_tokens")
        norm.weight.data = torch_npu.npu_format_cast(norm.weight.data, 29)
        with pytest.raises(RuntimeError, match=r"embed_tokens\.weight: its memory format is FRACTAL_NZ \(29\)"):
            Updates(model, config, scheme).send(weights_of(second))


@replaceable
@KINDS
def test_faults_are_rejected_by_name_and_a_full_update_recovers(tmp_path, kind):
    first, second = checkpoints(tmp_path, kind, 2)
    config, scheme = built(first)
    weights = weights_of(second)
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        encoded = dict(updates.encoded(weights))
        faults = [
            ({f"{name}_scale": torch.nn.functional.pad(encoded[f"{name}_scale"], (0, 2))}, "not padded"),
            ({name: weights[name]}, "bfloat16"),
            ({name: encoded[name][:-1]}, "shape"),
        ]
        for change, message in faults:
            with pytest.raises((WeightUpdateError, ValueError), match=rf"{name}.*{message}"):
                updates.stream((encoded | change).items())
        updates.send(weights)
        assert_same(parameters_of(model), engine_parameters(weights, fp4=fp4))
        assert addresses(model) == before


@replaceable
@pytest.mark.parametrize(("kind", "over"), [("qwen3", {}), ("qwen3_moe", {"moe_intermediate_size": 128})])
def test_self_test_passes_and_updates_follow(tmp_path, kind, over):
    first, second = checkpoints(tmp_path, kind, 2, **over)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        complete_experts(model)
        before = addresses(model)
        run_mxfp4_self_test(model, config, RELEASE)
        assert addresses(model) == before
        updates = Updates(model, config, scheme)
        updates.send(weights_of(second))
        assert_same(parameters_of(model), engine_parameters(weights_of(second), fp4=fp4))
        assert addresses(model) == before


def strided_writes(monkeypatch, layer):
    """As if a copy between tensors in NZ format wrote elements in the order of their strides."""
    own = layer.quant_method.quant_method
    process = own.process_weights_after_loading

    def processing(loaded):
        plain = {key: loaded._parameters[key].data.clone() for key in own_weights(loaded)}
        process(loaded)
        for key, weight in plain.items():
            made = loaded._parameters[key].data.transpose(-1, -2)
            torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage()).copy_(weight.flatten())

    monkeypatch.setattr(own, "process_weights_after_loading", processing)


def own_weights(layer):
    return [key for key in layer._mxfp4_original_shapes if not key.endswith("_scale")]


def other_group(monkeypatch, layer):
    """As if the operators read other scales than the layout says."""
    own = layer.quant_method.quant_method
    apply = own.apply

    def shifted(*arguments, **options):
        if "x" in options:
            options["x"] = options["x"].roll(32, -1)
        else:
            arguments = (arguments[0], arguments[1].roll(32, -1), *arguments[2:])
        return apply(*arguments, **options)

    monkeypatch.setattr(own, "apply", shifted)


FAULTS = {
    "memory": (strided_writes, r"weight: \d+ of \d+ bytes of the kernel layout are not those that load 1 wrote"),
    "product": (other_group, r"the product with .*weight differs"),
}


@replaceable
@pytest.mark.parametrize("fault", FAULTS)
@KINDS
def test_self_test_names_a_fault(tmp_path, monkeypatch, kind, fault):
    damage, message = FAULTS[fault]
    (first,) = checkpoints(tmp_path, kind, 1)
    config, _ = built(first)
    with engine(config):
        model = build_model(config)
        complete_experts(model)
        for name, layer in mxfp4_layers(model).items():
            if ("experts" in name) == (kind == "qwen3_moe"):
                damage(monkeypatch, layer)
        with pytest.raises(RuntimeError, match=rf"MXFP4 self-test failed in model\.\S+ with {RELEASE}: .*{message}"):
            run_mxfp4_self_test(model, config, RELEASE)
