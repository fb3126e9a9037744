"""A run with LoRA adapters and a quantized rollout."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e


def test_adapters_are_merged_into_an_mxfp8_rollout(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    run.run(
        actor_rollout_ref__model__lora_rank=8,
        actor_rollout_ref__actor__optim__lr=5e-2,
        actor_rollout_ref__rollout__quantization="ascend",
        actor_rollout_ref__rollout__checkpoint_engine__delta="on",
        actor_rollout_ref__rollout__checkpoint_engine__delta_check_interval=1,
        actor_rollout_ref__actor__checkpoint__save_contents="[model,optimizer,extra,hf_model]",
        trainer__save_freq=2,
    )
    for metrics in run.metrics().values():
        # The trainer rounds the merged weights too. An update without the adapters would give 0.008 in step 2.
        assert metrics["training/rollout_probs_diff_mean"] < 1e-5
    assert run.metrics()[2]["weight_update/delta"] == 1.0
    assert run.metrics()[2]["weight_update/delta_mismatches"] == 0.0
    actor = run.out / "global_step_2" / "actor"
    written = load_file(actor / "huggingface" / "model.safetensors")
    base = load_file(run.model / "model.safetensors")
    assert {name for name in base if not torch.equal(base[name], written[name])} == {
        name for name in base if "_proj" in name
    }
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model), actor / "lora_adapter")
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        if name in written:
            torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-5)
