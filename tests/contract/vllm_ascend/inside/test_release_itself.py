"""Behavior of the release without verl's hooks, which explains the hooks, and the patches that verl applies to it."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract.vllm_ascend.harness import RELEASE, build_model, engine
from contract.vllm_ascend.updates import checkpoints, config_of, scheme_of, weights_of
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm_ascend.quantization.methods import get_scheme_class
from vllm_ascend.sample import sampler as ascend_sampler

from verl.utils.quantization.ascend_releases import validate_mxfp4
from verl.utils.vllm.logprobs_mode import apply_logprobs_mode
from verl.utils.vllm.npu_vllm_patch import apply_patches

BEFORE_0_28 = ("0.18.0", "0.23.0", "0.26.0rc1")


def built(directory):
    config = config_of(directory)
    return config, scheme_of(directory)


@pytest.mark.skipif(RELEASE == "0.18.0", reason="0.18.0 has no restore")
def test_restore_of_the_release_moves_scales_before_0_26(tmp_path):
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        # Kept alive, so that the allocator cannot return the same memory again.
        weight, scale = layer.weight.data, layer.weight_scale.data
        for each in [module for module in model.modules() if hasattr(module, "_mxfp8_transformed")]:
            each.quant_method.quant_method.restore_weights_for_rl_loading(each)
        model.load_weights(scheme.encode(weights_of(second).items()))
        layer.quant_method.process_weights_after_loading(layer)
        moved = layer.weight_scale.data_ptr() != scale.data_ptr()
        assert moved == (RELEASE == "0.23.0")
        assert layer.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_loading_into_the_kernel_layout_fails(tmp_path, kind):
    first, second = checkpoints(tmp_path, kind, 2)
    config, scheme = built(first)
    with engine(config):
        model = build_model(config)
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            model.load_weights(scheme.encode(weights_of(second).items()))


def test_patches_applied_to_the_release():
    def patched(owner, name):
        return getattr(getattr(owner, name), "_verl_patched", False)

    # 0.18.0 records no layout; from 0.27.1 on vLLM's layer-wise reload of the weight transfer is repaired.
    reloads = RELEASE not in BEFORE_0_28
    for kind in ("linear", "moe"):
        scheme = get_scheme_class("W8A8_MXFP8", kind)
        assert patched(scheme, "process_weights_after_loading") == (RELEASE == "0.18.0" or reloads)
    if reloads:
        transfer = import_module("vllm_ascend.distributed.weight_transfer.hccl_engine").HCCLWeightTransferEngine
        assert all(patched(transfer, name) for name in ("receive_weights", "finish_weight_update"))
    before_0_26 = RELEASE in ("0.18.0", "0.23.0")
    assert patched(ApplyRotaryEmb, "__init__") == before_0_26
    is_class = isinstance(getattr(fused_moe, "FusedMoE", None), type)
    assert is_class == before_0_26
    assert not is_class or patched(fused_moe.FusedMoE, "weight_loader")
    # Without a class to patch, the other half of the patch is left out too.
    moved = find_spec("vllm_ascend.ops.fused_moe.routed_experts") is not None
    module = import_module(f"vllm_ascend.ops.fused_moe.{'routed_experts' if moved else 'fused_moe'}")
    experts = module.AscendUnquantizedFusedMoEMethod
    assert patched(experts, "process_weights_after_loading") == is_class
    assert apply_patches() == []


@pytest.mark.skipif(RELEASE not in BEFORE_0_28, reason="later releases restore the weights of this scheme")
def test_release_that_cannot_restore_mxfp4_weights_is_refused(tmp_path):
    try:
        scheme = get_scheme_class("W4A8_MXFP", "linear")
    except (KeyError, ValueError, NotImplementedError):
        scheme = None
    assert not hasattr(scheme, "restore_weights_for_rl_loading")
    (first,) = checkpoints(tmp_path, "qwen3", 1)
    layers = scheme_of(first, quantization_scheme="W4A8_MXFP").format.layers
    with pytest.raises(ValueError, match=rf"_proj is W4A8_MXFP, and vllm-ascend {RELEASE} cannot replace"):
        validate_mxfp4(layers, 1, RELEASE)


def test_logprobs_mode_reaches_the_sampler(tmp_path, monkeypatch):
    """The model runner builds the sampler without the mode."""
    # The choice of a token uses streams, which the stand-in does not have.
    monkeypatch.setattr(ascend_sampler, "random_sample", lambda probs, *_: probs.argmax(-1))
    source = find_spec("vllm_ascend.worker.model_runner_v1").origin
    assert "self.sampler = AscendSampler()\n" in Path(source).read_text()
    runner = SimpleNamespace(sampler=ascend_sampler.AscendSampler())
    logits, top_k = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), torch.full((4,), 3)

    def returned():
        return runner.sampler.topk_topp_sampler.forward_native(logits.clone(), {}, top_k, None)[1]

    (directory,) = checkpoints(tmp_path, "qwen3", 1)
    with engine(config_of(directory)):
        assert returned() is None, "the release passes the mode on"
        apply_logprobs_mode(runner, "processed_logprobs")
        found = returned()
    best = logits.topk(3)
    expected = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values.log_softmax(-1))
    torch.testing.assert_close(found, expected)
