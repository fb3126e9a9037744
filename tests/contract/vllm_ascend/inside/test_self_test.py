"""The self-test with the release's layers: it passes, changes nothing, and finds faults of a release."""

import pytest
import torch
from contract.vllm_ascend import ranks
from contract.vllm_ascend.forward import complete_experts
from contract.vllm_ascend.harness import RELEASE, build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import Updates, addresses, checkpoints, config_of, scheme_of, weights_of

from fixtures.ranks import run_ranks
from verl.utils.vllm import vllm_fp8_utils
from verl.workers.rollout.quantization.mxfp8_self_test import run_self_test

pytestmark = pytest.mark.feature("self_test")

NAME = f"vllm-ascend {RELEASE}"
OLD = ("0.18.0", "0.23.0", "0.26.0rc1")
MODELS = {
    "dense": ("qwen3", {}),
    "dense, untied, grouped": ("llama", {"tied": False, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "experts": ("qwen3_moe", {"moe_intermediate_size": 128}),
    "odd groups": ("qwen3", {"hidden_size": 96, "intermediate_size": 160}),
    "partial groups": ("qwen3", {"hidden_size": 80, "intermediate_size": 4304}),
}


@pytest.mark.parametrize(("kind", "over"), MODELS.values(), ids=MODELS)
def test_self_test_passes_and_changes_nothing(tmp_path, kind, over):
    if RELEASE == "0.18.0" and over.get("hidden_size", 64) % 64:
        pytest.skip("0.18.0 supports only multiples of 64 inputs")
    first, second = checkpoints(tmp_path, kind, 2, **over)
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        complete_experts(model)
        updates, before = Updates(model, config, scheme_of(first)), addresses(model)
        run_self_test(model, config, NAME)
        for source in (first, second):
            updates.send(weights_of(source))
            run_self_test(model, config, NAME)
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert addresses(model) == before


@pytest.mark.skipif(RELEASE in OLD, reason="the release does not pad shares")
def test_padded_shares_of_two_ranks(tmp_path):
    sources = checkpoints(tmp_path, "qwen3", 1, hidden_size=128, intermediate_size=80)
    run_ranks(2, ranks.self_test, 2, sources[0], [(0, 24), (8, 16)])


def test_one_rank_alone(tmp_path):
    """The self-test of a rank does not wait for others: the product is that before the sum over ranks."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    (source,) = checkpoints(tmp_path, "qwen3_moe", 1, **sizes)
    run_ranks(2, ranks.self_test, 2, source, [(0, 0), (0, 0)])


def exchange_pairs(layer):
    layer.weight_scale.data.copy_(layer.weight_scale.data.flip(-1).clone())


def move_weight(layer):
    layer.kept = layer.weight.data
    layer.weight.data = layer.weight.data.clone()


FAULTS = {
    "bytes": (exchange_pairs, r"weight_scale: \d+ of \d+ bytes of the kernel layout are not those that load 1 wrote"),
    "address": (move_weight, r"weight moved in load 1: .* captured graphs would read the old memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_processing_of_a_release_is_named(tmp_path, monkeypatch, fault):
    """As if the release's own hooks, or ours, did not fit the release."""
    damage, message = FAULTS[fault]
    (source,) = checkpoints(tmp_path, "qwen3", 1)
    config = config_of(source)
    with engine(config):
        model = build_model(config)
        before, values = addresses(model), parameters_of(model)
        apply = vllm_fp8_utils._apply

        def faulty(name, layer):
            apply(name, layer)
            damage(layer)

        monkeypatch.setattr(vllm_fp8_utils, "_apply", faulty)
        with pytest.raises(RuntimeError, match=rf"self-test failed in model\.layers\.0\.\S+ with {NAME}: {message}"):
            run_self_test(model, config, NAME)
        assert addresses(model) == before
        assert_same(parameters_of(model), values)


@pytest.mark.parametrize(("kind", "what"), [("qwen3", "weight"), ("qwen3_moe", "w13_weight and w2_weight")])
def test_faulty_product_of_a_release_is_named(tmp_path, kind, what):
    """The scheme of a layer reads another group of inputs than the layout says."""
    (source,) = checkpoints(tmp_path, kind, 1)
    config = config_of(source)
    with engine(config):
        model = build_model(config)
        complete_experts(model)
        values = parameters_of(model)
        for name, layer in vllm_fp8_utils.mxfp8_layers(model).items():
            if ("experts" in name) == (kind == "qwen3_moe"):
                scheme = layer.quant_method.quant_method

                def shifted(layer, x, *arguments, apply=scheme.apply, **options):
                    return apply(layer, x.roll(32, -1), *arguments, **options)

                def by_name(apply=scheme.apply, **options):
                    return apply(**options | {"x": options["x"].roll(32, -1)})

                scheme.apply = by_name if kind == "qwen3_moe" else shifted
        with pytest.raises(RuntimeError, match=rf"with {NAME}: the product with {what} differs"):
            run_self_test(model, config, NAME)
        assert_same(parameters_of(model), values)


@pytest.mark.skipif(RELEASE in OLD, reason="the release keeps MXFP8 weights in ND in every mode")
@pytest.mark.parametrize(("kind", "what"), [("qwen3", "weight"), ("qwen3_moe", "w13_weight and w2_weight")])
def test_weights_in_nz_are_found_without_the_formats(tmp_path, monkeypatch, kind, what):
    """The bytes behind the strides are right, but the operators read blocks: only a product shows it."""
    (source,) = checkpoints(tmp_path, kind, 1)
    description = scheme_of(source).format.description.to_json_dict()
    config = make_vllm_config(source, description, load_format="dummy", additional_config={})
    with engine(config), torch.no_grad():
        model = build_model(config)
        complete_experts(model)
        layers = model.get_submodule("model.layers.0.mlp")
        with pytest.raises(RuntimeError, match=r"self-test failed in .*its memory format is FRACTAL_NZ"):
            run_self_test(layers, config, NAME)
        monkeypatch.setattr(vllm_fp8_utils, "check_memory_formats", lambda model: None)
        with pytest.raises(RuntimeError, match=rf"the product with {what} differs"):
            run_self_test(layers, config, NAME)
