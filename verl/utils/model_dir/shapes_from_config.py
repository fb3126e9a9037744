"""Names and shapes of a checkpoint's tensors from its config.json alone, for directories without weights.

Supports decoders like Llama: attention with a gated MLP or with experts, with one tensor per projection and expert, as
in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.utils.model_dir.index import CheckpointIndex, has_weights, read_checkpoint_index, read_model_config
from verl.utils.model_dir.safetensors_header import TensorInfo


@dataclass(frozen=True)
class _Kind:
    """Differences between model types.

    Attributes:
        qkv_bias: q, k and v always have biases.
        head_norms: queries and keys are normalized per head.
        experts: layers may have experts.
    """

    qkv_bias: bool = False
    head_norms: bool = False
    experts: bool = False


_KINDS = {
    "llama": _Kind(),
    "mistral": _Kind(),
    "qwen2": _Kind(qkv_bias=True),
    "qwen3": _Kind(head_norms=True),
    "qwen3_moe": _Kind(head_norms=True, experts=True),
}


def read_index_or_config(model_dir: str | Path) -> CheckpointIndex:
    """Read the index of a checkpoint; for a directory without weights, derive it from config.json.

    Raises:
        ValueError: as `read_checkpoint_index`, or an unknown model type.
    """
    directory = Path(model_dir)
    if not directory.is_dir() or has_weights(directory):
        return read_checkpoint_index(directory)
    return index_of_config(directory, read_model_config(directory))


def index_of_config(model_dir: Path, config: Mapping[str, Any]) -> CheckpointIndex:
    """Return the BF16 checkpoint that a config.json describes.

    Raises:
        ValueError: an unknown model type, or a size is missing in the config.
    """
    model_type = config.get("model_type")
    if model_type not in _KINDS:
        raise ValueError(
            f"{model_dir}: has no weights, and verl does not know the tensors of a model of type {model_type!r} (it "
            f"knows {', '.join(_KINDS)}); copy the weights there, or model.safetensors.index.json and the shards"
        )
    try:
        tensors = {name: TensorInfo(shape, "BF16") for name, shape in _tensors(config, _KINDS[str(model_type)])}
    except KeyError as error:
        raise ValueError(f"{model_dir}/config.json: has no {error.args[0]}; copy it from the model again") from None
    return CheckpointIndex(model_dir, config, tensors)


def _tensors(config: Mapping[str, Any], kind: _Kind) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        yield from _attention(f"{layer}.self_attn", config, kind)
        if kind.experts and _has_experts(config, number):
            yield from _experts(f"{layer}.mlp", config)
        else:
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"], config.get("mlp_bias", False))
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(name: str, config: Mapping[str, Any], kind: _Kind) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    bias = config.get("attention_bias", False)
    outputs = {"q_proj": heads * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size}
    for projection, rows in outputs.items():
        yield f"{name}.{projection}.weight", (rows, hidden)
        if bias or kind.qkv_bias:
            yield f"{name}.{projection}.bias", (rows,)
    yield f"{name}.o_proj.weight", (hidden, heads * size)
    if bias:
        yield f"{name}.o_proj.bias", (hidden,)
    if kind.head_norms:
        yield f"{name}.q_norm.weight", (size,)
        yield f"{name}.k_norm.weight", (size,)


def _mlp(name: str, hidden: int, width: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
        yield f"{name}.{projection}_proj.weight", shape
        if bias:
            yield f"{name}.{projection}_proj.bias", shape[:1]


def _has_experts(config: Mapping[str, Any], number: int) -> bool:
    step = config.get("decoder_sparse_step", 1)
    return number not in config.get("mlp_only_layers", ()) and (number + 1) % step == 0


def expert_count(config: Mapping[str, Any]) -> int:
    """Return the number of experts of a layer; transformers writes another field than published models have.

    Raises:
        KeyError: the config has neither field.
    """
    count: int = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    return count


def _experts(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, count = config["hidden_size"], expert_count(config)
    yield f"{name}.gate.weight", (count, hidden)
    for expert in range(count):
        yield from _mlp(f"{name}.experts.{expert}", hidden, config["moe_intermediate_size"])
