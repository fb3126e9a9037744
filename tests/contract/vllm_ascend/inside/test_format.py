"""Memory formats: with `weight_nz_mode=0` all weights are strided, without it updates are refused."""

import pytest
import torch
import torch_npu
from contract.vllm_ascend.harness import RELEASE, build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import Updates, addresses, checkpoints, config_of, scheme_of, weights_of

from fixtures.deltas import nudged
from verl.utils.vllm import reload, vllm_fp8_utils
from verl.utils.vllm.apply_delta import DeltaApplier
from verl.utils.vllm.vllm_fp8_utils import check_kernel_layouts, mxfp8_layers, restore_kernel_parameters

ND, FRACTAL_NZ = 2, 29
casts_mxfp8 = pytest.mark.skipif(
    RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1"), reason="the release keeps MXFP8 weights in ND in every mode"
)
FIRST = {"qwen3": r"model\.layers\.0\.self_attn\.qkv_proj\.weight", "qwen3_moe": r"model\.layers\.0\.\S+weight"}


def default_config(source):
    """Create the configuration without verl's settings: the release's default is `weight_nz_mode=1`."""
    description = scheme_of(source).format.description.to_json_dict()
    return make_vllm_config(source, description, load_format="dummy", additional_config={})


def formats(model):
    parameters = [item for layer in mxfp8_layers(model).values() for item in layer._parameters.items()]
    return {torch_npu.get_npu_format(weight.data) for key, weight in parameters if key.endswith("weight")}


@pytest.mark.feature("nz")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_weights_are_strided_with_the_settings_of_verl(tmp_path, kind):
    first, second = checkpoints(tmp_path, kind, 2)
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        check_kernel_layouts(model)
        before = addresses(model)
        updates = Updates(model, config, scheme_of(first))
        for source in [second, first] * 2 + [second]:
            updates.send(weights_of(source))
            assert formats(model) == {ND}
            assert addresses(model) == before


@pytest.mark.feature("nz")
@casts_mxfp8
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_update_of_weights_in_nz_is_refused_and_changes_nothing(tmp_path, kind):
    first, second = checkpoints(tmp_path, kind, 2)
    config = default_config(first)
    with engine(config):
        model = build_model(config)
        assert formats(model) == {FRACTAL_NZ}
        before = parameters_of(model)
        message = rf"{FIRST[kind]}: its memory format is FRACTAL_NZ \(29\), expected ND \(2\).*weight_nz_mode=0"
        with pytest.raises(RuntimeError, match=message):
            check_kernel_layouts(model)
        updates = Updates(model, config, scheme_of(first))
        with pytest.raises(RuntimeError, match=message):
            updates.send(weights_of(second))
        with pytest.raises(RuntimeError, match=message):
            restore_kernel_parameters(model)  # the beginning of a delta
        assert_same(parameters_of(model), before)


@pytest.mark.feature("nz")
@casts_mxfp8
def test_format_that_an_update_changes_is_refused_after_it(tmp_path):
    """A release could cast weights while it processes loaded ones."""
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first))
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        scheme = layer.quant_method.quant_method
        process = scheme.process_weights_after_loading

        def casting(loaded):
            process(loaded)
            loaded.weight.data = torch_npu.npu_format_cast(loaded.weight.data, FRACTAL_NZ)

        scheme.process_weights_after_loading = casting
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: its memory format"):
            updates.send(weights_of(second))


@pytest.mark.feature("nz")
@casts_mxfp8
@pytest.mark.parametrize("delta", [False, True], ids=["full", "delta"])
def test_format_of_an_unquantized_layer_is_read_after_an_update(tmp_path, monkeypatch, delta):
    """vLLM reloads these layers after the hooks have finished."""
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first))
        for source in (first, second):
            updates.send(weights_of(source))
        owner, name = (DeltaApplier, "finish") if delta else (reload, "finish_reload")
        finish = getattr(owner, name)

        def casting(*arguments):
            finish(*arguments)
            weight = model.get_parameter("model.embed_tokens.weight")
            weight.data = torch_npu.npu_format_cast(weight.data, FRACTAL_NZ)

        monkeypatch.setattr(owner, name, casting)
        weights = weights_of(second)
        with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight: its memory format is FRACTAL_NZ"):
            updates.send_delta(weights, nudged(weights, 0, 1e-2)) if delta else updates.send(weights)


@casts_mxfp8
def test_without_the_check_weights_in_nz_are_silently_corrupted(tmp_path, monkeypatch):
    """The reason for the check: no operation raises, and the operators read other weights than those sent."""
    monkeypatch.setattr(vllm_fp8_utils, "check_memory_formats", lambda model: None)
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config = default_config(first)
    with engine(config), torch.no_grad():
        model = build_model(config)
        Updates(model, config, scheme_of(first)).send(weights_of(second))
        with pytest.raises(AssertionError, match=r"proj\.weight: \d+ of \d+ differ"):
            assert_same(parameters_of(model), engine_parameters(weights_of(second)))


@casts_mxfp8
@pytest.mark.parametrize("key", ["weight_nz_mod", "no_such_key"])
def test_unknown_key_is_refused_by_the_release(tmp_path, key):
    """So verl passes only keys that the release has."""
    (first,) = checkpoints(tmp_path, "qwen3", 1)
    description = scheme_of(first).format.description.to_json_dict()
    config = make_vllm_config(first, description, load_format="dummy", additional_config={key: 0})
    with pytest.raises(ValueError, match=key), engine(config):
        pass
