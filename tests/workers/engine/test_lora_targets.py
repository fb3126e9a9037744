"""Selection of the layers that get a LoRA adapter."""

import pytest
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import make_engine
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": str(write_tiny_model(root / "qwen3")),
        "qwen3_moe": str(write_tiny_model(root / "moe", kind="qwen3_moe")),
    }


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (
            "qwen3",
            {"target_modules": ["q_proj", "vproj"]},
            "unknown module vproj of Qwen3ForCausalLM; did you mean v_proj",
        ),
        (
            "qwen3",
            {"exclude_modules": ["mlp.down"]},
            "exclude_modules: unknown module mlp.down of Qwen3ForCausalLM; did you mean do",
        ),
        (
            "qwen3",
            {"target_modules": ["mlp.q_proj"]},
            "unknown module mlp.q_proj of Qwen3ForCausalLM; did you mean q_proj",
        ),
        ("qwen3", {"exclude_modules": r".*proj"}, "exclude_modules=.*proj: they select no layer of Qwen3ForCausalLM"),
        ("qwen3", {"target_modules": "q_proj"}, "they select no layer of Qwen3ForCausalLM; it has down_proj"),
        (
            "qwen3",
            {"target_modules": ["embed_tokens"]},
            "model.embed_tokens has type Embedding, but only linear layers",
        ),
        ("qwen3", {"target_modules": ["mlp"]}, "model.layers.0.mlp has type Qwen3MLP, but only linear layers"),
        ("qwen3", {"target_modules": ["lm_head"]}, "lm_head shares its weight with the embeddings"),
        ("qwen3_moe", {"target_modules": ["gate"]}, "mlp.gate has type Qwen3MoeTopKRouter, but only linear layers"),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj"]}, "unknown module gate_proj of Qwen3MoeForCausalLM"),
    ],
)
def test_unsupported_targets_are_an_error(models, model, options, text):
    def program(rank):
        with pytest.raises(ValueError) as caught:
            make_engine(models[model], lora_rank=2, **options)
        assert text in str(caught.value)

    run_ranks(1, program)


def test_linear_layers_that_peft_takes_for_experts_are_an_error(tmp_path):
    """The first layers of GLM-4.5 are dense; their projections have the names of packed experts in other models."""
    import transformers

    config = transformers.Glm4MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    def program(rank):
        with pytest.raises(ValueError, match=r"exclude_modules=\[down_proj,gate_proj,up_proj\]"):
            make_engine(tmp_path, lora_rank=2)
        engine = make_engine(tmp_path, lora_rank=2, exclude_modules=["down_proj", "gate_proj", "up_proj"])
        return {name.rpartition(".lora_")[0] for name, p in engine.model.named_parameters() if p.requires_grad}

    [layers] = run_ranks(1, program)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
