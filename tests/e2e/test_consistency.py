"""The comparison of engine and trainer stops a run in which one of them computes something else, and says which."""

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

# Code that a run loads. Each breaks the forward pass of trainer or engine in another way.
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
OTHER_LOGITS = """
from verl.workers.engine.fsdp import _SelectRows
logits = _SelectRows.logits
_SelectRows.logits = lambda self, *arguments: 1.2 * logits(self, *arguments)
"""
# Code that the engine's processes load, too; only they have imported vLLM.
OTHER_ENGINE = """
import sys
if "vllm" in sys.modules:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    init = LogitsProcessor.__init__
    def other(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.scale *= 1.2
    LogitsProcessor.__init__ = other
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (ACTIVE_WHILE_TRAINING, "the trainer computes other log-probabilities in an update than before it"),
        (SHAPE_OF_THE_BATCH, "the trainer computes other log-probabilities of a sample alone"),
        (OTHER_LOGITS, "the trainer computes another model"),
        (OTHER_ENGINE, "the engine computes another model"),
    ],
    ids=["active while training", "shape of the batch", "other logits", "other engine"],
)
def test_a_side_that_computes_another_model_is_named(tmp_path, ray_address, code, message):
    run = TinyRun(tmp_path, ray_address)
    (tmp_path / "broken.py").write_text(code)
    text = run.run(actor_rollout_ref__model__external_lib="broken.py", status=1)
    assert message in text and "trainer.check_consistency=False" in text
    assert not (run.out / "metrics.jsonl").exists() or not run.metrics()
    assert list(run.out.glob(".consistency-*")) == []


def test_rounding_is_not_taken_for_a_fault(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    text = run.run(
        actor_rollout_ref__rollout__quantization="ascend",
        actor_rollout_ref__rollout__dtype="bfloat16",
        actor_rollout_ref__actor__fsdp_config__dtype="bfloat16",
    )
    # MXFP8 changes this model so much that only the reference tells that nothing else is wrong.
    assert text.count("against an eager float32 model of the same weights the engine differs by") == 2
