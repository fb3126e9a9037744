"""torchao in a real vLLM engine on the CPU: the trainer sends plain weights, and the engine quantizes each update."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fixtures.deltas import OneBucketDelta, nudged
from fixtures.engine import log_probs_of, weights_of
from fixtures.torchao import torchao_directory
from verl.config import RolloutConfig
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(torchao_directory())
    path = tmp_path / "torchao.json"
    path.write_text(json.dumps({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}))
    return path


def fake_quantized(model_dir):
    """Return the model with its weights quantized to int8 and back, one scale for each output."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.data.double()
            scale = (weight.abs().amax(1, keepdim=True) / 127.5).float().double()
            module.weight.data = ((weight / scale).round().clamp(-128, 127) * scale).float()
    return model


def test_the_engine_computes_with_the_weights_of_the_last_update(tiny_models, engines, config_file):
    first, second, third = tiny_models(3, std=0.05)
    rollout = RolloutConfig(quantization="torchao", quantization_config_file=str(config_file))
    engine, scheme = engines.get(first, rollout)
    for version, source in enumerate([second, third, first], 1):
        engine.update(scheme.encode(weights_of(source).items()), version, 1 << 24 if version % 2 else 20_000)
        responses, log_probs = engine.sample(tokens=10)
        difference = (log_probs - log_probs_of(fake_quantized(source), responses)).abs().mean()
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert difference < 0.3 * (log_probs - log_probs_of(plain, responses)).abs().mean()
    # A delta is quantized in the same way as a full update.
    old = dict(scheme.encode(weights_of(first).items()))
    new = nudged(old, 0, size=1e-2)
    changes, before = OneBucketDelta(old, new, 4), engine.rpc("verl_parameter_hashes")
    engine.checked("verl_begin_update", 4, engine.quantization, 3)
    engine.checked("verl_load_bucket", changes.bucket)
    engine.checked("verl_finish_update", changes.manifest)
    changed = engine.rpc("verl_parameter_hashes")
    engine.update(new.items(), 5)
    assert engine.rpc("verl_parameter_hashes") == changed != before


def test_tensors_without_a_place_in_the_engine_are_refused(tiny_models, engines, config_file):
    (source,) = tiny_models(1, attention_bias=True)
    rollout = RolloutConfig(quantization="torchao", quantization_config_file=str(config_file))
    engine, scheme = engines.get(source, rollout)
    with pytest.raises(
        WeightUpdateError, match=r"no place for 2 tensors .*: model\.layers\.0\.self_attn\.o_proj\.bias"
    ):
        engine.update(scheme.encode(weights_of(source).items()), 1)
