"""`actor_rollout_ref.model`: the model of actor, reference and rollout, and how it is loaded."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.conditions import any_of, has_own_memory, unless, when
from verl.config.schema import ConfigSection, key, section, unsupported, without_effect

SHM = "weights are read from the files themselves"


@dataclass
class LoraConfig(ConfigSection):
    """Transfer of LoRA adapters to the engine; the keys `lora_*` of the model define the adapters."""

    rank: int = key(
        0,
        "not read; use actor_rollout_ref.model.lora_rank",
        only=(0,),
        use="use actor_rollout_ref.model.lora_rank and .lora_alpha",
    )
    merge: bool = without_effect(
        True, "adapters are always added to the weights before sending, so that the engine serves a plain model"
    )


@dataclass
class FusedKernelOptions(ConfigSection):
    """Implementation of the fused log-probability head."""

    impl_backend: str = without_effect("torch", "torch operators compute the head on every device")


@dataclass
class ModelConfig(ConfigSection):
    """The model and how it is loaded."""

    path: str | None = key(
        None,
        "directory of a Hugging Face model with config.json and safetensors, or its name on the hub, which must be in "
        "the hub's cache",
        required=True,
        path=True,
        hub=True,
    )
    tokenizer_path: str | None = key(
        None, "directory of the tokenizer, or its name on the hub; null: the model's", path=True, hub=True
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the model or its tokenizer")
    override_config: dict[str, Any] = key(
        {},
        "fields of the model's config with other values, for trainer and engine; attn_implementation: the trainer's "
        "attention backend",
    )
    enable_gradient_checkpointing: bool = key(True, "save memory by computing activations again in the backward pass")
    use_remove_padding: bool = key(
        True,
        "run the sequences of a micro-batch without padding, in one row; False: pad them to the maximum lengths",
    )
    use_fused_kernels: bool | None = key(
        None,
        "compute log-probabilities in tiles of the logits, which are never in memory as a whole; null: if the model "
        "permits it; False: keep the logits of a micro-batch",
    )
    fused_kernel_options: FusedKernelOptions = section(
        FusedKernelOptions, "implementation of the fused log-probability head"
    )
    use_shm: bool = without_effect(False, SHM)
    use_liger: bool = unsupported(False, "Liger kernels")
    external_lib: list[str] | None = key(
        None,
        "your Python files or modules, which register estimators, losses, agent loops and models; the driver, the "
        "trainer's ranks and the engines import them",
    )
    hf_config_path: str | None = unsupported(None, "a model config in another directory than the weights")
    custom_chat_template: str | None = unsupported(
        None, "a chat template in the config", "set chat_template in the tokenizer's directory (tokenizer_path)"
    )
    enable_activation_offload: bool = key(
        False,
        "keep the inputs of the layers in host memory between forward and backward pass; needs "
        "enable_gradient_checkpointing",
        only_with=has_own_memory,
    )
    lora_rank: int = key(
        0, "rank of the LoRA adapters; a run with adapters trains nothing else; 0: no adapters", at_least=0
    )
    lora_alpha: int = key(
        16,
        "scale of the adapters: lora_alpha / lora_rank",
        above=0,
        same_if=when("lora_rank", 0),
        only_with=any_of(
            unless("lora_rank", 0),
            unless("lora_adapter_path", None),
            reason="without adapters (model.lora_rank=0)",
        ),
    )
    lora_adapter_path: str | None = key(
        None, "directory of a peft adapter to start from; it also decides rank, alpha and modules", path=True
    )
    target_modules: str | list[str] = key(
        "all-linear",
        "linear layers that get an adapter: a list of names or of their endings, a regular expression for whole names, "
        "or all-linear for all linear layers except the output head",
    )
    exclude_modules: str | list[str] | None = key(
        None, "linear layers that get no adapter: a list of names or endings, or a regular expression"
    )
    target_parameters: list[str] | None = unsupported(
        None, "LoRA on parameters that are not linear layers, such as fused experts"
    )
    lora: LoraConfig = section(LoraConfig, "transfer of LoRA adapters to the engine")
