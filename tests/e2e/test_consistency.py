"""The comparison of engine and trainer stops a run in which one of them computes something else, and says which."""

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

# Code that a run loads into its trainer ranks. Each breaks the trainer's forward pass in another way.
ACTIVE_WHILE_TRAINING = """
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
forward = Qwen3MLP.forward
Qwen3MLP.forward = lambda self, x: forward(self, x) * (0.5 if torch.is_grad_enabled() else 1.0)
"""
SHAPE_OF_THE_BATCH = """
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
forward = Qwen3RotaryEmbedding.forward
def by_length(self, x, position_ids):
    cos, sin = forward(self, x, position_ids * (2 if x.shape[1] > 40 else 1))
    return cos, sin
Qwen3RotaryEmbedding.forward = by_length
"""
OTHER_ATTENTION = """
from verl.workers.engine.packed_attention import PackedSequences
attend = PackedSequences.attend
def other(self, module, query, *arguments, **options):
    return attend(self, module, query * 2, *arguments, **options)
PackedSequences.attend = other
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (ACTIVE_WHILE_TRAINING, "the trainer computes other log-probabilities in an update than before it"),
        (SHAPE_OF_THE_BATCH, "the trainer computes other log-probabilities of a sample alone"),
        (OTHER_ATTENTION, "the trainer computes another model"),
    ],
    ids=["active while training", "shape of the batch", "other attention"],
)
def test_a_trainer_that_computes_another_model_is_named(tmp_path, ray_address, code, message):
    run = TinyRun(tmp_path, ray_address)
    (tmp_path / "broken.py").write_text(code)
    text = run.run(actor_rollout_ref__model__external_lib="broken.py", status=1)
    assert message in text and "trainer.check_consistency=False" in text
    assert not (run.out / "metrics.jsonl").exists() or not run.metrics()
    assert list(run.out.glob(".consistency-*")) == []


def test_an_engine_that_computes_another_model_is_named(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address, std=0.02)
    overrides = {"+actor_rollout_ref__rollout__engine_kwargs__vllm__hf_overrides__rms_norm_eps": 0.3}
    text = run.run(actor_rollout_ref__rollout__quantization="ascend", status=1, **overrides)
    assert "the engine computes another model" in text


def test_rounding_is_not_taken_for_a_fault(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    text = run.run(
        actor_rollout_ref__rollout__quantization="ascend",
        actor_rollout_ref__rollout__dtype="bfloat16",
        actor_rollout_ref__actor__fsdp_config__dtype="bfloat16",
    )
    # MXFP8 changes this model so much that only the reference tells that nothing else is wrong.
    assert text.count("against an eager float32 model of the same weights the engine differs by") == 2
