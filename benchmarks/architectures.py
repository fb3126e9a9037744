"""Tiny models with random weights, one for each architecture whose support `model_table.py` measures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

VOCABULARY = 256
# Dimensions that fp8's blocks of 128 x 128 divide, and a head size that vLLM's attention has on a CPU.
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
# vLLM's latent attention on a CPU computes with a cache of 512 + 64 values only.
_MLA = {"q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
_MLA |= {"num_key_value_heads": 4, "head_dim": None, "n_shared_experts": 1, "first_k_dense_replace": 1}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        example: a public model of it.
        fields: fields of its config that differ from the common ones; None leaves a common field out.
        vision: True if it is a vision-language model.
        dtype: the only dtype in which vLLM runs it on every CPU; None for any.
        published: name in the public checkpoints' config.json, if it differs from that in transformers.
    """

    example: str
    fields: dict[str, Any] = field(default_factory=dict)
    vision: bool = False
    dtype: str | None = None
    published: str | None = None

    def config(self, name: str) -> PretrainedConfig:
        """Return the config; `name` is the prefix of its class."""
        common = {} if self.vision else {**_TEXT, "initializer_range": 0.05}
        fields = {key: value for key, value in {**common, **self.fields}.items() if value is not None}
        return getattr(transformers, f"{name}Config")(**fields)


def _longrope() -> dict[str, Any]:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    return {**rope, "short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [2.0 + i for i in range(32)]}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("Llama-3.1-8B"),
    "Mistral": Architecture("Mistral-7B", {"sliding_window": 8}),
    "Qwen2": Architecture("Qwen2.5-7B"),
    "Qwen3": Architecture("Qwen3-8B"),
    # With larger weights, the scaled and tied embeddings make every token repeat itself.
    "Gemma": Architecture("gemma-7b", {"tie_word_embeddings": True, "initializer_range": 0.01}),
    "Gemma2": Architecture(
        "gemma-2-9b",
        {**_SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    ),
    "Gemma3Text": Architecture("gemma-3-1b", {**_SLIDING, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "Phi": Architecture("phi-2", {"num_key_value_heads": 4}),
    "Phi3": Architecture("Phi-3-mini-128k", {"rope_parameters": _longrope(), "original_max_position_embeddings": 64}),
    "Granite": Architecture(
        "granite-3.3-8b", {"attention_multiplier": 0.1, "logits_scaling": 4.0, "attention_dropout": 0.1}
    ),
    "Olmo2": Architecture("OLMo-2-7B"),
    "Olmo3": Architecture("Olmo-3-7B", _SLIDING),
    "Glm": Architecture("glm-4-9b-hf"),
    "Glm4": Architecture("GLM-4-9B-0414"),
    "Cohere": Architecture("c4ai-command-r", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "Cohere2": Architecture("c4ai-command-r7b", {**_SLIDING, "sliding_window": 64, "tie_word_embeddings": True}),
    "Starcoder2": Architecture("starcoder2-7b", {"sliding_window": 8}),
    "StableLm": Architecture("stablelm-2-1_6b"),
    "SmolLM3": Architecture("SmolLM3-3B"),
    "Exaone4": Architecture("EXAONE-4.0-1.2B", _SLIDING),
    "Ernie4_5": Architecture("ERNIE-4.5-0.3B"),
    "SeedOss": Architecture("Seed-OSS-36B"),
    "GPT2": Architecture(
        "gpt2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}
    ),
    "GPTNeoX": Architecture("pythia-1b", {"num_key_value_heads": None}),
    "OPT": Architecture("opt-1.3b", {"ffn_dim": 256, "word_embed_proj_dim": 256, "num_key_value_heads": None}),
    "Falcon": Architecture(
        "falcon-7b", {"head_dim": None, "alibi": False, "new_decoder_architecture": False, "multi_query": True}
    ),
    "Bloom": Architecture("bloom-7b1", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "Mixtral": Architecture("Mixtral-8x7B", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2Moe": Architecture(
        "Qwen1.5-MoE-A2.7B", {"num_experts": 4, "shared_expert_intermediate_size": 128, **_EXPERTS}
    ),
    "Qwen3Moe": Architecture("Qwen3-30B-A3B", {"num_experts": 4, **_EXPERTS}),
    "Olmoe": Architecture("OLMoE-1B-7B", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoe": Architecture("granite-3.1-3b-a800m", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phimoe": Architecture(
        "Phi-3.5-MoE",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
        published="PhiMoEForCausalLM",
    ),
    "Glm4Moe": Architecture(
        "GLM-4.5-Air", {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **_EXPERTS}
    ),
    "DeepseekV2": Architecture("DeepSeek-V2-Lite", {"n_routed_experts": 4, **_MLA, **_EXPERTS}, dtype="bfloat16"),
    "DeepseekV3": Architecture(
        "DeepSeek-V3",
        {"n_routed_experts": 4, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, **_MLA, **_EXPERTS},
        dtype="bfloat16",
    ),
    "GptOss": Architecture(
        "gpt-oss-20b",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE, **_SLIDING},
    ),
    "Qwen3Next": Architecture(
        "Qwen3-Next-80B-A3B",
        {
            "num_experts": 4,
            "shared_expert_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention"],
            **_EXPERTS,
        },
        dtype="bfloat16",
    ),
    "Qwen2_5_VL": Architecture(
        "Qwen2.5-VL-7B", {"text_config": _TEXT, "vision_config": _VISION, "pad_token_id": 0}, vision=True
    ),
    "Qwen3VL": Architecture(
        "Qwen3-VL-8B", {"text_config": _TEXT, "vision_config": _VISION, "pad_token_id": 0}, vision=True
    ),
    "Qwen3_5": Architecture(
        "Qwen3.5-9B", {"text_config": _TEXT, "vision_config": _VISION, "pad_token_id": 0}, vision=True
    ),
}


def write_architecture(name: str, directory: Path) -> None:
    """Write a model in float32, with random biases and norms, and its tokenizer."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if architecture.vision else AutoModelForCausalLM
    model = auto.from_config(architecture.config(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    if architecture.published is not None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture.published]}))
    models.write_tokenizer(VOCABULARY, directory)
