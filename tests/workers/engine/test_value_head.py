"""Value models: values compared with transformers, heads in checkpoints, errors, and saved critics."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from fixtures.critic_cases import critic_config, make_value_engine, values_program
from fixtures.engine_cases import fsdp_config, make_batch
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.protocol import DataProto
from verl.trainer.ppo.batching import split_even
from verl.workers.engine import MicroBatching

ALL = MicroBatching(size=100)
HEAD = (torch.linspace(-1.0, 1.0, 65)[:-1].view(1, 64) / 4, torch.tensor([-0.25]))


def plain_values(model, data, head=HEAD):
    """Return values [B, T], computed with left padding, attention mask and the last hidden states of all positions."""
    # Packed experts do not support float64.
    model = model.eval() if "Moe" in type(model).__name__ else model.double().eval()
    width = data.batch["responses"].shape[1]
    with torch.no_grad():
        states = model(
            input_ids=data.batch["input_ids"],
            attention_mask=data.batch["attention_mask"],
            position_ids=data.batch["position_ids"],
            output_hidden_states=True,
        ).hidden_states[-1]
    values = (states.double() @ head[0].double().T).squeeze(-1) + head[1].double()
    return (values[:, -width - 1 : -1] * data.batch["response_mask"]).float()


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "tied", "limits", "options"),
    [
        ("qwen3", True, ALL, {}),
        ("qwen3", False, MicroBatching(size=5), {"use_remove_padding": False}),
        ("llama", True, MicroBatching(max_tokens=33), {"enable_gradient_checkpointing": True}),
        ("qwen3_moe", False, MicroBatching(size=1), {}),
    ],
)
def test_values_equal_those_of_transformers(tmp_path, kind, tied, limits, options):
    path = write_tiny_model(tmp_path / "model", kind=kind, tied=tied)
    data = make_batch(13)
    expected = plain_values(AutoModelForCausalLM.from_pretrained(path), data)
    assert expected.abs().max() > 0.5
    saved = load_file(path / "model.safetensors")
    for ranks in (1, 2):
        shards, inverse = split_even(data, ranks)
        parts = run_ranks(ranks, values_program, critic_config(path, options), shards, limits)
        joined = DataProto.concat([DataProto.from_dict(tensors={"values": values}) for values, _ in parts])[inverse]
        assert joined.batch["values"].dtype == torch.float32
        torch.testing.assert_close(joined.batch["values"], expected, rtol=1e-5, atol=1e-5)
        assert not joined.batch["values"][data.batch["response_mask"] == 0].any()
        for _, weights in parts:
            assert set(weights) == (set(saved) - {"lm_head.weight"}) | {"score.weight", "score.bias"}
            torch.testing.assert_close(weights["score.weight"], HEAD[0])
            assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items() if name in weights)


@pytest.mark.parametrize(
    ("architecture", "over"),
    [
        # Limits logits to far less than the values here; the expected values are computed without the other cap.
        ("Gemma2", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": None}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("GPTNeoX", {}),  # the head has another name
    ],
)
def test_operations_on_logits_do_not_affect_values(tmp_path, architecture, over):
    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
    config = getattr(transformers, f"{architecture}Config")(**common, **heads, pad_token_id=0, **over)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    data = make_batch()
    expected = plain_values(AutoModelForCausalLM.from_pretrained(tmp_path), data)
    assert expected.abs().max() > 0.5
    for ranks in (1, 2):
        for values, _ in run_ranks(ranks, values_program, critic_config(tmp_path), [data] * ranks, ALL):
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_head_starts_at_zero(tmp_path, ranks):
    path = write_tiny_model(tmp_path / "model")
    for values, weights in run_ranks(ranks, values_program, critic_config(path), [make_batch()] * ranks, ALL, False):
        assert not values.any()
        assert not weights["score.weight"].any() and not weights["score.bias"].any()


@pytest.mark.parametrize("prefix", ["score.", "v_head.summary."])
@pytest.mark.parametrize("with_lm_head", [True, False])
def test_a_head_in_the_checkpoint_is_used(tmp_path, prefix, with_lm_head):
    path = write_tiny_model(tmp_path / "model", tied=False)

    def change(tensors):
        tensors.update({f"{prefix}weight": HEAD[0].clone(), f"{prefix}bias": HEAD[1].clone()})
        if not with_lm_head:
            del tensors["lm_head.weight"]

    expected = plain_values(AutoModelForCausalLM.from_pretrained(path), make_batch())
    rewrite(path, change)
    for ranks in (1, 2):
        for values, _ in run_ranks(ranks, values_program, critic_config(path), [make_batch()] * ranks, ALL, False):
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_head_without_bias_is_used_and_one_with_two_outputs_is_an_error(tmp_path):
    path = write_tiny_model(tmp_path / "model")
    rewrite(path, lambda tensors: tensors.update({"score.weight": HEAD[0].clone()}))
    [(values, weights)] = run_ranks(1, values_program, critic_config(path), [make_batch()], ALL, False)
    assert values.any() and not weights["score.bias"].any()
    rewrite(path, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))
    with pytest.raises(ValueError, match=r"critic\.model\.path=.*has 2 outputs.*num_labels=1"):
        run_ranks(1, values_program, critic_config(path), [make_batch()], ALL)


def test_a_missing_weight_of_the_backbone_is_an_error(tmp_path):
    path = write_tiny_model(tmp_path / "model", tied=False)
    rewrite(path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"critic\.model\.path=.*missing_keys: model\.norm\.weight; use"):
        run_ranks(1, values_program, critic_config(path), [make_batch()], ALL)


def test_an_unknown_key_of_override_config_names_the_critics_section(tmp_path):
    path = write_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"critic\.model\.override_config: unknown key rms_eps for Qwen3Config"):
        run_ranks(1, values_program, critic_config(path, {"override_config": {"rms_eps": 1.0}}), [make_batch()], ALL)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_critic_is_a_token_classification_model_that_can_be_loaded_again(tmp_path, tied):
    path = write_tiny_model(tmp_path / "model", tied=tied)
    data = make_batch()

    def program(rank, target):
        from fixtures.critic_cases import set_head

        engine = make_value_engine(critic_config(path, {"tokenizer_path": str(path)}))
        set_head(engine.model)
        engine.export_hf(target)
        return engine.values(data, ALL)

    [values] = run_ranks(1, program, str(tmp_path / "saved"))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(model).__name__ == "Qwen3ForTokenClassification" and model.num_labels == 1
    with torch.no_grad():
        logits = model(
            input_ids=data.batch["input_ids"],
            attention_mask=data.batch["attention_mask"],
            position_ids=data.batch["position_ids"],
        ).logits
    expected = logits[:, -8:-1, 0] * data.batch["response_mask"]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["architectures"] == ["Qwen3ForTokenClassification"]
    for ranks in (1, 2):
        again = run_ranks(ranks, values_program, critic_config(tmp_path / "saved"), [data] * ranks, ALL, False)
        for other, _ in again:
            torch.testing.assert_close(other, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_head_stays_float32_in_a_bfloat16_model(tmp_path, ranks):
    """Values of bfloat16 hidden states are close to the exact values, and have a finer resolution than bfloat16."""
    path = write_tiny_model(tmp_path / "model")
    data = make_batch()
    expected = plain_values(AutoModelForCausalLM.from_pretrained(path), data)
    config = critic_config(path, fsdp=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    for values, weights in run_ranks(ranks, values_program, config, [data] * ranks, ALL):
        assert weights["score.weight"].dtype == torch.float32
        assert weights["model.norm.weight"].dtype == torch.bfloat16
        assert (values - expected).abs().max() < 0.15
        assert (values != values.bfloat16().float()).any()


def test_a_model_without_a_separate_backbone_is_an_error():
    from verl.workers.engine.value_head import to_value_model

    model = AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(hidden_size=8, vocab_size=16, num_hidden_layers=1, intermediate_size=8)
    )
    model.base_model_prefix = "nothing"
    with pytest.raises(NotImplementedError, match=r"Qwen3ForCausalLM has no backbone.*critic\.model\.path"):
        to_value_model(model)
