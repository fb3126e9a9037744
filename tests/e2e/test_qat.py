"""With quantization-aware training, trainer and MXFP8 engine compute the same policy."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.engine import PROMPTS, log_probs_of, weights_of
from fixtures.engine_cases import make_batch
from fixtures.fake_quant import check_equal_up_to_rounding
from fixtures.qat_cases import qat_export_program, qat_log_prob_program
from fixtures.ranks import run_ranks
from verl.config import RolloutConfig
from verl.protocol import DataProto
from verl.trainer.ppo.batching import split_mini_batches

pytestmark = pytest.mark.e2e

ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
# Three groups of 32 in a row, and a last one that is not full.
ODD = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 80}
STEPS = 4


def batch_of(responses):
    """Return the columns of a forward pass over the engine's prompts and responses."""
    prompts, responses = torch.tensor(PROMPTS), torch.tensor(responses)
    ids = torch.cat([prompts, responses], 1)
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompts": prompts, "responses": responses}
    columns |= {"response_mask": torch.ones_like(responses), "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    return DataProto.from_dict(tensors=columns, meta_info={"temperature": 1.0})


@pytest.mark.parametrize(
    ("kind", "tied", "sizes"),
    [("qwen3", True, {}), ("qwen3", False, ODD), ("qwen3_moe", False, {}), ("qwen3_moe", True, ODD)],
    ids=["tied", "untied, odd groups", "experts, untied", "experts, tied, odd groups"],
)
def test_trainer_and_engine_agree_after_each_of_four_steps(tmp_path, tiny_models, engines, kind, tied, sizes):
    """The trainer's ranks are processes of their own, because the engine's process group is in this one."""
    sizes = {key: value for key, value in sizes.items() if "moe" not in key or "moe" in kind}
    (source,) = tiny_models(1, kind=kind, tied=tied, std=0.02, **sizes)
    directories = [tmp_path / str(step) for step in range(STEPS)]
    shards = split_mini_batches(make_batch(STEPS * 4), 4, 2)
    run_ranks(2, qat_export_program, str(source), shards, [str(directory) for directory in directories])
    engine, scheme = engines.get(source, ROLLOUT)
    for directory in directories:
        engine.update(scheme.encode(weights_of(directory).items()))
        responses, log_probs = engine.sample()
        data = batch_of(responses)
        for trainer in run_ranks(2, qat_log_prob_program, str(directory), [data, data], {}, {}):
            check_equal_up_to_rounding(trainer, log_probs)
        unrounded = log_probs_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), responses)
        assert (unrounded - log_probs).abs().mean() > 5e-4, "nothing was quantized"
    assert len({tuple(weights_of(directory)["model.norm.weight"].tolist()) for directory in directories}) == STEPS
