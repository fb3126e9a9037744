"""`actor_rollout_ref.model`: the model and how it is loaded."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.schema import key, planned, section

_RANK = "set actor_rollout_ref.model.lora_rank and .lora_alpha, whose place this is not"


@dataclass
class LoraConfig:
    """How adapters reach the engine; the adapters themselves are the keys `lora_*` above."""

    rank: int = key(0, "not read: actor_rollout_ref.model.lora_rank is the key", only=(0,), use=_RANK)
    merge: bool = key(
        True,
        "send the weights with the adapters added to them, so that the engine serves a plain model",
        only=(True,),
        use="use True: adapters apart from the weights are not supported by the rollout",
    )


@dataclass
class ModelConfig:
    """The model and how it is loaded."""

    path: str | None = key(
        None,
        "directory of a Hugging Face model, with config.json and safetensors, or its name on the hub, which is looked "
        "for in the hub's cache",
        required=True,
        path=True,
        hub=True,
    )
    tokenizer_path: str | None = key(None, "directory of the tokenizer, null for the model's", path=True, hub=True)
    trust_remote_code: bool = key(False, "run Python code that comes with the model or its tokenizer")
    override_config: dict[str, Any] = key({}, "fields of the model's config to replace, e.g. attn_implementation")
    enable_gradient_checkpointing: bool = key(True, "recompute activations in the backward pass to save memory")
    use_remove_padding: bool = key(
        True, "give the model the real tokens alone, all sequences of a micro-batch in a row; else pad to the caps"
    )
    use_fused_kernels: bool = planned(False, "a fused log-probability head")
    use_shm: bool = planned(False, "staging the model in shared memory")
    use_liger: bool = planned(False, "Liger kernels")
    external_lib: list[str] | None = key(
        None,
        "your Python files or modules, imported by the driver and the trainer's ranks: they register estimators, "
        "losses and agent loops",
    )
    hf_config_path: str | None = planned(None, "a config apart from the weights")
    custom_chat_template: str | None = planned(
        None, "a chat template in the config", "set chat_template in the tokenizer's directory (tokenizer_path)"
    )
    enable_activation_offload: bool = planned(False, "activation offload")
    lora_rank: int = key(0, "rank of LoRA adapters, which are then all that is trained; 0 for none", at_least=0)
    lora_alpha: int = key(16, "adapters are scaled by lora_alpha / lora_rank", above=0)
    lora_adapter_path: str | None = key(
        None, "directory of a peft adapter to start from; its rank, alpha and modules hold", path=True
    )
    target_modules: str | list[str] = key(
        "all-linear",
        "linear layers that get an adapter: a list of names or their ends, a regular expression over whole names, or "
        "all-linear for all but the output head",
    )
    exclude_modules: str | list[str] | None = key(None, "linear layers that get none, named in the same ways")
    target_parameters: list[str] | None = planned(None, "LoRA on parameters that are no linear layer, fused experts")
    lora: LoraConfig = section(LoraConfig, "how adapters reach the engine")
