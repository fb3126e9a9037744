"""Numbers of inputs that are not a multiple of 64: an odd number of groups, or a partial last group."""

import itertools

import pytest
import torch
from contract.vllm_ascend.harness import RELEASE, build_model, engine
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import (
    Updates,
    assert_every_update_lands,
    checkpoints,
    config_of,
    scheme_of,
    weights_of,
)
from vllm_ascend.quantization.methods import get_scheme_class

from verl.utils.vllm.vllm_fp8_utils import mxfp8_layers

ODD = {"hidden_size": 96, "intermediate_size": 160}
SIZES = {
    "96 and 160": ODD,
    "80": {"hidden_size": 80, "intermediate_size": 80},
    "4304": {"intermediate_size": 4304},
}


@pytest.mark.feature("groups")
@pytest.mark.skipif(RELEASE == "0.18.0", reason="0.18.0 supports only multiples of 64 inputs")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_updates_of_linear_layers(tmp_path, sizes):
    assert_every_update_lands(checkpoints(tmp_path, "qwen3", **sizes))


@pytest.mark.skipif(RELEASE != "0.18.0", reason="later releases have ceil(K / 32) scales and pad them to pairs")
@pytest.mark.parametrize(("k", "scales"), [(96, 3), (80, 2), (4304, 134)])
def test_release_that_drops_a_group_is_rejected_when_the_engine_starts(tmp_path, k, scales):
    """With 80 and 4304 inputs 0.18.0 itself raises no error and does not load the scales of the last group."""
    (first,) = checkpoints(tmp_path, "qwen3", 1, intermediate_size=k)
    config = config_of(first)
    message = rf"model\.layers\.0\.mlp\.down_proj\.weight has {k} inputs .* {scales} scales .*multiples of 64"
    with engine(config), pytest.raises(ValueError, match=message):
        build_model(config)


@pytest.mark.parametrize("k", [96, 80, 4304])
def test_restore_of_the_release_fails(tmp_path, k):
    """The reason why `_release_restores` requires an even number of groups."""
    if RELEASE == "0.18.0":
        assert not hasattr(get_scheme_class("W8A8_MXFP8", "linear"), "restore_weights_for_rl_loading")
        return
    (first,) = checkpoints(tmp_path, "qwen3", 1, intermediate_size=k)
    config = config_of(first)
    with engine(config):
        layer = build_model(config).get_submodule("model.layers.0.mlp.down_proj")
        with pytest.raises(RuntimeError, match=r"shape '.*' is invalid for input"):
            layer.quant_method.quant_method.restore_weights_for_rl_loading(layer)


EXPERTS = {"H = 96": (96, 64), "I = 96": (64, 96), "I = 48": (64, 48)}


@pytest.mark.parametrize(("hidden", "inner"), EXPERTS.values(), ids=EXPERTS)
def test_no_release_supports_experts_with_an_odd_number_of_groups(tmp_path, hidden, inner):
    """No release pads their scales to pairs. verl rejects 0.18.0 before it tries."""
    (first,) = checkpoints(tmp_path, "qwen3_moe", 1, hidden_size=hidden, moe_intermediate_size=inner)
    ignore = tmp_path / "ignore.json"
    # Attention is ignored: 0.18.0 would fail at linear layers first.
    ignore.write_text('{"ignore": ["re:.*self_attn.*"]}')
    config = config_of(first, quantization_config_file=str(ignore))
    kind, message = RuntimeError, r"shape '.*' is invalid for input"
    if RELEASE == "0.18.0":
        kind, message = ValueError, rf"mlp\.experts\.w.*_weight has {hidden if hidden % 64 else inner} inputs"
    with engine(config), pytest.raises(kind, match=message):
        build_model(config)


@pytest.mark.feature("groups")
def test_padding_group_is_zero_after_an_update(tmp_path):
    """The operators read the padding, so it must not contain other bytes."""
    if RELEASE == "0.18.0":
        pytest.skip("0.18.0 supports only multiples of 64 inputs")
    first, second = checkpoints(tmp_path, "qwen3", 2, **ODD)
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first))
        for source, stray in itertools.product([second, first], [255, 7]):
            for layer in mxfp8_layers(model).values():
                layer.weight_scale.data.fill_(stray)
            updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert all(torch.all(layer.weight_scale[-1, :, 1] == 0) for layer in odd(model))


def odd(model):
    return [layer for name, layer in mxfp8_layers(model).items() if not name.endswith("o_proj")]
