"""`actor_rollout_ref.model`: the model and how it is loaded."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.trainer.config.schema import key, planned, section


@dataclass
class LoraConfig:
    """LoRA adapters."""

    rank: int = planned(0, "LoRA")
    merge: bool = planned(False, "LoRA")


@dataclass
class ModelConfig:
    """The model and how it is loaded."""

    path: str | None = key(
        None, "directory of a Hugging Face model, with config.json and safetensors", required=True, path=True
    )
    tokenizer_path: str | None = key(None, "directory of the tokenizer, null for the model's", path=True)
    trust_remote_code: bool = key(False, "run Python code that comes with the model or its tokenizer")
    override_config: dict[str, Any] = key({}, "fields of the model's config to replace, e.g. attn_implementation")
    enable_gradient_checkpointing: bool = key(True, "recompute activations in the backward pass to save memory")
    use_remove_padding: bool = key(True, "pad a micro-batch to its longest sequence, not to the caps")
    use_fused_kernels: bool = planned(False, "a fused log-probability head")
    use_shm: bool = planned(False, "staging the model in shared memory")
    use_liger: bool = planned(False, "Liger kernels")
    external_lib: str | None = planned(None, "modules imported in every process")
    hf_config_path: str | None = planned(None, "a config apart from the weights")
    custom_chat_template: str | None = planned(
        None, "a chat template in the config", "set chat_template in the tokenizer's directory (tokenizer_path)"
    )
    enable_activation_offload: bool = planned(False, "activation offload")
    lora_rank: int = planned(0, "LoRA")
    lora_alpha: int = planned(16, "LoRA")
    lora_adapter_path: str | None = planned(None, "LoRA")
    target_modules: str | list[str] = planned("all-linear", "LoRA")
    exclude_modules: str | list[str] | None = planned(None, "LoRA")
    lora: LoraConfig = section(LoraConfig, "LoRA adapters: not supported yet")
