"""The comparison of engine and trainer stops a run in which one of them computes something else, and says which."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.architectures import longrope, write_architecture
from fixtures.tiny import write_char_tokenizer
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
from verl.workers.engine.output_head import OutputHead
log_probs = OutputHead.log_probs
OutputHead.log_probs = lambda self, batch, temperature, **options: log_probs(self, batch, temperature / 1.2, **options)
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


@dataclass
class Fault:
    """A fault that verl once had: code that brings it back, and a model whose results it changes.

    Attributes:
        architecture, fields: arguments of `write_architecture`.
        edit: change of the checkpoint's tensors, in place.
        keys: overrides of the run.
        message: part of the error.
    """

    code: str
    message: str
    architecture: str = "Qwen3"
    fields: dict = field(default_factory=dict)
    edit: object = None
    keys: dict = field(default_factory=dict)

    def write_model(self, directory):
        # The sizes of a head that vLLM's attention on a CPU supports start at 32.
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
        write_architecture(directory, self.architecture, **{**heads, **self.fields})
        write_char_tokenizer(directory)
        if self.edit:
            tensors = load_file(directory / "model.safetensors")
            self.edit(tensors)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def hide_the_choice_of_experts(tensors):
    """Give the experts biases that alone decide the choice, and whose differences bfloat16 rounds away.

    Scores are between 0 and 1, so the rounding of a bfloat16 engine does not change the choice.
    """
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(4096.0 + 1.2 * torch.arange(len(bias), dtype=torch.float32))


FAULTS = {
    "updates in train mode": Fault(
        """
import torch
from verl.workers.engine.fsdp import FSDPEngine
forward = FSDPEngine._forward
def in_train_mode(self, *arguments, **keywords):
    self.model.train(torch.is_grad_enabled())
    return forward(self, *arguments, **keywords)
FSDPEngine._forward = in_train_mode
""",
        "the trainer computes other log-probabilities in an update than before it",
        "Granite",
        {"attention_dropout": 0.1},
    ),
    "attention that drops soft caps": Fault(
        """
from verl.workers.engine import attention_choice, loading
loading.choose_attention = lambda *_, **__: attention_choice.AttentionChoice("sdpa", packs=False)
""",
        "the trainer computes another model",
        "Gemma2",
        {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "longrope by the longest sequence of a batch": Fault(
        """
from verl.workers.engine import loading
loading.fix_rope_length = lambda *_: None
""",
        "the trainer computes other log-probabilities of a sample alone",
        "Phi3",
        {
            "rope_parameters": longrope(12, short_factor=[1.0] * 16, long_factor=[2.0 + i for i in range(16)]),
            "original_max_position_embeddings": 12,
        },
    ),
    "config fields that the engine does not get": Fault(
        """
import sys
if "vllm" in sys.modules:
    from vllm.engine.arg_utils import EngineArgs
    create = EngineArgs.create_model_config
    def without_overrides(self):
        self.hf_overrides = {}
        return create(self)
    EngineArgs.create_model_config = without_overrides
""",
        "the engine computes another model",
        keys={"actor_rollout_ref__model__override_config": "{rms_norm_eps: 0.3}"},
    ),
    "tensors without a place in the engine": Fault(
        """
from verl.workers.weight_sync import driver
driver.check_used = lambda *_: None
""",
        "the engine computes another model",
        fields={"attention_bias": True},
    ),
    "float32 tensors sent in bfloat16": Fault(
        """
from verl.workers.weight_sync import driver
transfer = driver._transfer
async def without_dtypes(*arguments):
    export, seconds, _ = await transfer(*arguments)
    return export, seconds, {}
driver._transfer = without_dtypes
""",
        "the engine computes another model",
        "Glm4Moe",
        edit=hide_the_choice_of_experts,
        keys={"actor_rollout_ref__rollout__dtype": "bfloat16"},
    ),
}


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


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_was_corrected_would_be_noticed(tmp_path, ray_address, fault):
    run = TinyRun(tmp_path, ray_address)
    fault.write_model(run.model)
    (tmp_path / "fault.py").write_text(fault.code)
    text = run.run(actor_rollout_ref__model__external_lib="fault.py", status=1, **fault.keys)
    assert "ConsistencyError" in text and fault.message in text


def test_rounding_is_not_taken_for_a_fault(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    text = run.run(
        actor_rollout_ref__rollout__quantization="ascend",
        actor_rollout_ref__rollout__dtype="bfloat16",
        actor_rollout_ref__actor__fsdp_config__dtype="bfloat16",
        actor_rollout_ref__actor__fsdp_config__qat__enable=False,
    )
    # MXFP8 changes this model so much that only the reference tells that nothing else is wrong.
    assert text.count("against an eager float32 model of the same weights the engine differs by") == 2
