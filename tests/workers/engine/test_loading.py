"""Loading a checkpoint: missing and mismatched weights are errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.architectures import architecture_config, train_mode_fields, write_architecture
from fixtures.critic_cases import critic_batch, critic_config, make_value_engine, set_head
from fixtures.engine_cases import actor_config, export_program, fsdp_config, make_batch, make_engine
from fixtures.memory_cases import assert_same_training, separate_memory, train_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.config.actor import MixedPrecisionConfig
from verl.trainer.ppo.batching import split_mini_batches
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.engine import MicroBatching
from verl.workers.engine.export import WeightExport
from verl.workers.engine.loading import parse_dtype
from verl.workers.policy_objective import PolicyObjective

LIMITS = MicroBatching(size=5)


def make_engine_with(rank, model_dir, override_config):
    make_engine(model_dir, override_config=override_config)


@pytest.fixture
def model_dir(tmp_path):
    return write_tiny_model(tmp_path / "model", tied=False)


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_weight_is_an_error(model_dir):
    rewrite(model_dir, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"model\.path=.*missing_keys: lm_head\.weight"):
        run_ranks(1, export_program, str(model_dir), None)


def test_a_wrong_shape_is_an_error(model_dir):
    rewrite(model_dir, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises((ValueError, RuntimeError), match=r"model\.norm\.weight|mismatch"):
        run_ranks(1, export_program, str(model_dir), None)


def test_override_config_reaches_the_model(model_dir):
    def program(rank):
        engine = make_engine(model_dir, override_config={"rms_norm_eps": 0.25, "attn_implementation": "eager"})
        return engine.model.config, engine.model.model.norm.variance_epsilon

    [(config, eps)] = run_ranks(1, program)
    assert config._attn_implementation == "eager"
    assert config.rms_norm_eps == eps == 0.25


def test_an_unknown_key_of_override_config_is_an_error(model_dir):
    with pytest.raises(ValueError, match=r"override_config: unknown key rms_eps for Qwen3Config; see .*config\.json"):
        run_ranks(1, make_engine_with, str(model_dir), {"rms_eps": 0.25})


def test_parse_dtype_accepts_known_names_only():
    assert parse_dtype("bf16", "x") is torch.bfloat16
    with pytest.raises(ValueError, match=r"fsdp_config\.model_dtype='fp8'.*bf16"):
        parse_dtype("fp8", "fsdp_config.model_dtype")


def update_and_forward(engine, data):
    """Return [B, T] log-probabilities of a training forward and of one without gradients, and the gradient norm."""
    trained = []

    def loss_fn(log_probs, entropy, columns):
        trained.append((columns["sample"], log_probs.detach()))
        return log_probs.sum(), {}

    engine.forward_backward(with_sample(data), loss_fn, LIMITS)
    frozen = engine.log_probs(data, LIMITS, calculate_entropy=False).log_probs
    return in_order(trained, frozen), frozen, engine.optimizer_step()["grad_norm"]


def with_sample(data):
    data.batch["sample"] = torch.arange(len(data))
    return data


def in_order(parts, like):
    joined = torch.zeros_like(like)
    for index, values in parts:
        joined[index] = values
    return joined


# Dropout of attention, residuals, embeddings; skipped layers; noise on a router; experts that are drawn in train mode.
TRAIN_MODE = [
    *("Llama", "Granite", "Gemma2", "Phi3", "Qwen3Moe", "Mixtral", "Phimoe", "GPT2", "OPT", "Bloom"),
    *("Falcon", "Starcoder2", "StableLm", "GPTNeoX", "GptOss", "Cohere"),
]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("architecture", TRAIN_MODE)
def test_an_update_computes_the_log_probs_of_a_forward_pass(tmp_path, architecture, gradient_checkpointing):
    fields = train_mode_fields(architecture_config(architecture))
    assert fields
    path = write_architecture(tmp_path, architecture, **dict.fromkeys(fields, 0.3))

    def program(rank):
        engine = make_engine(path, enable_gradient_checkpointing=gradient_checkpointing)
        return update_and_forward(engine, make_batch())

    [(trained, frozen, norm)] = run_ranks(1, program)
    assert torch.equal(trained, frozen)
    assert frozen.abs().max() > 1
    assert 0 < norm < float("inf")


def test_the_dropout_of_adapters_is_off(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = write_architecture(tmp_path / "model", "Llama")
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), adapter).save_pretrained(tmp_path / "adapter")

    def program(rank):
        engine = make_engine(path, lora_adapter_path=str(tmp_path / "adapter"), enable_gradient_checkpointing=True)
        return update_and_forward(engine, make_batch())

    [(trained, frozen, norm)] = run_ranks(1, program)
    assert torch.equal(trained, frozen)
    assert 0 < norm < float("inf")


@pytest.mark.parametrize("architecture", ["Granite", "GPT2", "Phimoe"])
def test_an_update_of_the_critic_computes_the_values_of_a_forward_pass(tmp_path, architecture):
    fields = train_mode_fields(architecture_config(architecture))
    path = write_architecture(tmp_path, architecture, **dict.fromkeys(fields, 0.3))
    data = with_sample(critic_batch())

    def program(rank):
        engine = make_value_engine(critic_config(path, {"enable_gradient_checkpointing": True}))
        set_head(engine.model)
        trained = []

        def loss_fn(values, columns):
            trained.append((columns["sample"], values.detach()))
            return values.sum(), {}

        engine.forward_backward(data, loss_fn, LIMITS)
        frozen = engine.values(data, LIMITS)
        return in_order(trained, frozen), frozen, engine.optimizer_step()["grad_norm"]

    [(trained, frozen, norm)] = run_ranks(1, program)
    assert torch.equal(trained, frozen)
    assert frozen.abs().max() > 0.1
    assert 0 < norm < float("inf")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_checkpointing_computes_each_layer_twice(model_dir, gradient_checkpointing):
    def program(rank):
        engine = make_engine(model_dir, enable_gradient_checkpointing=gradient_checkpointing)
        calls = []
        for layer in engine.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        *_, norm = update_and_forward(engine, make_batch(5))
        return len(engine.model.model.layers), calls, norm

    [(layers, calls, norm)] = run_ranks(1, program)
    assert calls == [True] * layers * (1 + gradient_checkpointing) + [False] * layers
    assert norm > 0


SHARDINGS = [
    {"offload_policy": True},
    {"offload_policy": True, "param_offload": True, "optimizer_offload": True, "fsdp_size": 1},
    {"forward_prefetch": True},
    {"reshard_after_forward": False, "forward_prefetch": True},
    {"mixed_precision": MixedPrecisionConfig("float32", "fp32", "fp32")},
]


@pytest.mark.parametrize("keys", SHARDINGS)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_steps_do_not_depend_on_the_sharding(model_dir, ranks, keys):
    shards = split_mini_batches(make_batch(12), 4, ranks)
    expected = run_ranks(ranks, train_program, str(model_dir), shards, {}, {})
    for model in ({}, {"enable_gradient_checkpointing": True}):
        found = run_ranks(ranks, train_program, str(model_dir), shards, keys, model)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_training(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("swap", [False, True])
def test_a_checkpoint_resumes_with_another_sharding(tmp_path, model_dir, ranks, swap):
    path, shards = str(tmp_path / "checkpoint"), split_mini_batches(make_batch(12), 4, ranks)
    before, after = ({}, SHARDINGS[0]) if swap else (SHARDINGS[0], {})
    straight = run_ranks(ranks, train_program, str(model_dir), shards, {}, {})
    run_ranks(ranks, train_program, str(model_dir), [rank[:1] for rank in shards], before, {}, None, path)
    resumed = run_ranks(ranks, train_program, str(model_dir), [rank[1:] for rank in shards], after, {}, path)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert_same_training(ours._replace(log_probs=theirs.log_probs), theirs._replace(history=theirs.history[1:]))


def sharded_engine(model_dir, **keys):
    with separate_memory():
        return make_engine(model_dir, actor=actor_config(fsdp_config=fsdp_config(**keys)))


def test_layers_gather_the_next_one(model_dir):
    def program(rank):
        model = sharded_engine(model_dir, forward_prefetch=True).model
        units = [model, *model.model.layers]
        following = [unit._get_fsdp_state()._states_to_forward_prefetch for unit in units]
        assert following == [*([unit._get_fsdp_state()] for unit in units[1:]), []]

    run_ranks(1, program)


def test_gradients_are_summed_in_reduce_dtype(model_dir):
    def program(rank):
        gradients, [batch] = [], split_mini_batches(make_batch(12), 12, 1)[0]
        for dtype in (None, "bf16"):
            engine = sharded_engine(model_dir, mixed_precision=MixedPrecisionConfig(reduce_dtype=dtype))
            objective = PolicyObjective(get_policy_loss_fn("vanilla"), actor_config(), batch.meta_info)
            engine.forward_backward(batch, objective, MicroBatching(size=12))
            gradients.append(
                {name: parameter.grad.full_tensor() for name, parameter in engine.model.named_parameters()}
            )
        exact, rounded = gradients
        for name, gradient in exact.items():
            assert torch.equal(rounded[name], gradient.bfloat16().float()), name
        assert any(not torch.equal(rounded[name], gradient) for name, gradient in exact.items())

    run_ranks(1, program)


def test_weights_on_the_host_are_exported_from_the_device(model_dir):
    """The device `meta` stands for an accelerator."""

    def program(rank):
        engine = sharded_engine(model_dir, offload_policy=True)
        groups = [layer._get_fsdp_state()._fsdp_param_group for layer in engine.model.model.layers]
        assert all(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)
        units = list(WeightExport(engine.model, torch.device("meta")).units())
        assert {part.device.type for unit in units for part in unit.parts.values()} == {"meta"}
        assert {part.device.type for unit in engine.export_units() for part in unit.parts.values()} == {"cpu"}

    run_ranks(1, program)
