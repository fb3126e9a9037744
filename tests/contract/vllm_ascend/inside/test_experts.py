"""Experts of vllm-ascend 0.28 and later: own buffers for the kernel layout, and MegaMoE, which disposes of weights."""

import sys

import pytest
from contract.vllm_ascend.forward import expert_layers
from contract.vllm_ascend.harness import RELEASE, build_model, engine
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import Updates, checkpoints, config_of, scheme_of, weights_of
from vllm_ascend.quantization.methods import get_scheme_class

from verl.utils.vllm.vllm_fp8_utils import check_kernel_layouts

pytestmark = pytest.mark.skipif(
    RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1"), reason="the release has neither own buffers nor MegaMoE"
)


def buffers(layer):
    """Return the addresses of the release's own buffers by parameter, after a comparison with the parameters'."""
    found = {}
    for key, pair in layer._mxfp8_moe_buffers.items():
        for name, buffer in zip((key, f"{key}_scale"), pair, strict=True):
            assert buffer.data_ptr() == getattr(layer, name).data_ptr()
            assert buffer.stride() == getattr(layer, name).stride()
            found[name] = buffer.data_ptr()
    return found


@pytest.mark.feature("updates")
def test_buffers_of_the_release_hold_every_update(tmp_path):
    sources = checkpoints(tmp_path, "qwen3_moe", 6)
    config = config_of(sources[0])
    with engine(config):
        model = build_model(config)
        updates, layers = Updates(model, config, scheme_of(sources[0])), expert_layers(model)
        before = {name: buffers(layer) for name, layer in layers.items()}
        assert len(before) == 2 and all(len(each) == 4 for each in before.values())
        for source in sources[1:]:
            updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert {name: buffers(layer) for name, layer in layers.items()} == before


@pytest.mark.feature("mega_moe")
def test_experts_that_mega_moe_disposed_of_are_refused(tmp_path, monkeypatch):
    """The settings that lead there are refused before (tests/utils/vllm/test_npu_settings.py)."""
    (source,) = checkpoints(tmp_path, "qwen3_moe", 1)
    config = config_of(source)
    # The release asks for an NPU with the operator and for several expert-parallel ranks.
    module = sys.modules[get_scheme_class("W8A8_MXFP8", "moe").__module__]
    monkeypatch.setattr(module, "use_cann_megamoe", lambda config: True)
    with engine(config):
        model = build_model(config)
        for layer in expert_layers(model).values():
            assert all(parameter.numel() == 0 for parameter in layer.parameters())
            assert len(layer.cann_mega_moe_w13_weight_list) == 4
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts.*w13_weight: .*released.*enable_fused_mc2"):
            check_kernel_layouts(model)
        with pytest.raises(RuntimeError, match=r"w13_weight: .*released.*enable_fused_mc2"):
            Updates(model, config, scheme_of(source)).send(weights_of(source))
