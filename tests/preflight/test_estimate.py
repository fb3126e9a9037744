import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.architectures import architecture_config
from verl.config import PPOConfig
from verl.preflight.estimate import critic_activation_bytes, head_bytes, score_bytes
from verl.utils.model_dir.model_files import model_of_config, read_model

MIB = 1 << 20
MODEL = "actor_rollout_ref__model__"


def test_host_memory_equals_the_sum_of_its_parts(plan_of, run_files):
    run_files.write_safetensors(run_files.weights, {"a": (25600, 1024)})
    parameters = 25600 * 1024
    delta = "actor_rollout_ref__rollout__checkpoint_engine__delta"
    fixed = {
        "actor_rollout_ref__rollout__dtype": "float32",
        "actor_rollout_ref__actor__fsdp_config__dtype": "float32",
        delta: "'off'",
    }
    one, two = plan_of(**fixed).memory, plan_of(**fixed, trainer__n_gpus_per_node=2).memory
    with_ref = plan_of(**fixed, actor_rollout_ref__actor__use_kl_loss=True).memory
    # float32 master weights, gradients and two moments: 16 bytes per parameter, half of it on each of two ranks;
    # the reference model: 4 bytes per parameter
    assert abs(one.trainer_bytes - two.trainer_bytes - 8 * parameters) < MIB
    assert with_ref.trainer_bytes - one.trainer_bytes == 4 * parameters
    # the last sent weights in float32, sharded over the trainer's ranks
    deltas = plan_of(**(fixed | {delta: "auto"}), trainer__n_gpus_per_node=2).memory
    assert deltas.trainer_bytes - two.trainer_bytes == 2 * parameters
    assert deltas.replica_bytes == two.replica_bytes
    half = plan_of(**(fixed | {"actor_rollout_ref__rollout__dtype": "bfloat16"})).memory
    # 8192 requests of 32 tokens need one block of 128 tokens each: keys and values of 2 layers with 2 heads of size 8
    many = plan_of(**fixed, actor_rollout_ref__rollout__max_num_seqs=8192).memory
    assert many.cache_bytes == 8193 * 128 * 2 * 2 * 2 * 8 * 4
    assert one.cache_bytes == 64 * MIB
    # float32 instead of bfloat16, for the packed copy and for both layouts during a full update
    assert one.replica_bytes - half.replica_bytes == 3 * 2 * parameters + one.cache_bytes - half.cache_bytes
    assert one.total_bytes == one.trainer_bytes + one.replica_bytes + one.other_bytes
    assert two.total_bytes == 2 * two.trainer_bytes + 2 * two.replica_bytes + two.other_bytes


def test_memory_of_lora_adapters(plan_of, run_files):
    shapes = {
        "model.embed_tokens.weight": (512, 1024),
        "model.layers.0.self_attn.q_proj.weight": (4096, 1024),
        "model.layers.0.self_attn.o_proj.weight": (1024, 4096),
        "model.layers.0.mlp.experts.0.up_proj.weight": (2048, 1024),
        "lm_head.weight": (512, 1024),
    }
    run_files.write_safetensors(run_files.weights, shapes)
    path = run_files.model / "config.json"
    sizes = {"hidden_size": 1024, "vocab_size": 512, "num_hidden_layers": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    parameters = sum(rows * columns for rows, columns in shapes.values())
    full = plan_of().memory.trainer_bytes
    lora = plan_of(**{MODEL + "lora_rank": 8}).memory.trainer_bytes
    adapters = 8 * 2 * (4096 + 1024)
    # only adapters have gradients and two moments; their weights are added
    assert full - lora == 12 * parameters - 16 * adapters
    one = plan_of(**{MODEL + "lora_rank": 8, MODEL + "exclude_modules": "[o_proj]"}).memory.trainer_bytes
    assert full - one == 12 * parameters - 8 * adapters
    named = plan_of(**{MODEL + "lora_rank": 8, MODEL + "target_modules": "[q_proj]"}).memory.trainer_bytes
    assert named == one


def test_memory_of_a_critic(plan_of, run_files):
    critic_model = shutil.copytree(run_files.model, run_files.root / "critic")
    config = PPOConfig()
    config.data.max_prompt_length = config.data.max_response_length = 16
    config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n = 8, 4
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 2
    config.critic.fsdp.model_dtype, config.critic.fsdp.dtype = "bf16", "float32"
    config.critic.model.enable_gradient_checkpointing = False
    # hidden 16, inner 32, 2 layers; 2 samples of 32 tokens in float32
    assert critic_activation_bytes(config, read_model(critic_model), "cpu", 1) == 64 * (8 * 16 + 4 * 32) * 4 * 2
    without, with_critic = (
        plan_of().memory,
        plan_of(algorithm__adv_estimator="gae", critic__model__path=critic_model).memory,
    )
    assert with_critic.trainer_bytes >= without.trainer_bytes + 16 * plan_of().parameters


@pytest.mark.parametrize(("fused", "itemsize"), [(None, 4), (True, 2), (False, 2), (False, 4)])
def test_memory_of_the_output_head(fused, itemsize):
    config = PPOConfig()
    config.actor_rollout_ref.model.use_fused_kernels = fused
    model = model_of_config(Path("model"), architecture_config("Qwen3", vocab_size=150_000, hidden_size=1024).to_dict())
    found = head_bytes(config, model, 16_384, itemsize)
    if fused is False:
        # the logits, their gradients, and two working copies of 2^24 elements
        assert found == 2 * 16_384 * 150_000 * itemsize + 2 * 4 * 2**24
    else:
        # four tiles, and the gradient of the hidden states in float32
        assert found == 4 * 4 * 2**23 + 16_384 * 1024 * 4
    # one row: no more than four copies
    one = head_bytes(config, model, 1, itemsize)
    assert one == (6 * itemsize * 150_000 if fused is False else 16 * 150_000 + 4 * 1024)


def kept_score_bytes(config, dtype, rows, length):
    """Return the bytes that the backward pass of a model with eager attention keeps in tensors [rows, heads, q, k]."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").train()
    kept = {}

    def keep(tensor):
        if tensor.numel() == rows * config.num_attention_heads * length**2 and tensor.shape[-2:] == (length, length):
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=torch.ones(rows, length, dtype=torch.int64), use_cache=False).logits
    assert logits.requires_grad  # alive until here, so that no address is used twice
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "over"), [("Gemma2", {}), ("Llama", {"attn_implementation": "eager"}), ("Bloom", {})]
)
def test_the_scores_of_eager_attention_are_those_that_a_backward_pass_keeps(architecture, over, dtype):
    rows, length = 3, 11
    config = architecture_config(architecture)
    files = model_of_config(Path("model"), config.to_dict() | over)
    measured = kept_score_bytes(config, dtype, rows, length)
    scores = rows * config.num_attention_heads * length**2 * config.num_hidden_layers
    assert measured == scores * score_bytes(files, dtype.itemsize)


def test_a_micro_batch_with_eager_attention_holds_the_scores_of_its_layers(plan_of):
    override = MODEL + "override_config"
    changes = {
        MODEL + "enable_gradient_checkpointing": False,
        "actor_rollout_ref__actor__fsdp_config__dtype": "float32",
    }
    packed = plan_of(**changes).memory.trainer_bytes
    eager = plan_of(**changes, **{override: "{attn_implementation: eager}"}).memory.trainer_bytes
    # 2 samples of 32 tokens, 4 heads, float32, 2 layers
    assert eager - packed == 2 * 32 * 32 * 4 * 4 * 2
