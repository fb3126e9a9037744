"""Shapes of public models, and the counts that determine times: parameters, sent bytes, FLOPs per token.

The quantization code counts the bytes: `read_layers` and `AscendDescription` get the names and shapes of a model on the
meta device, which needs no memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.model_dir.safetensors_header import TensorInfo
from verl.utils.quantization.ascend_description import AscendDescription
from verl.utils.quantization.ascend_layers import read_layers

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4}
# Values of the models' config.json files; `model_type` qwen3 and qwen3_moe.
PUBLIC: dict[str, PretrainedConfig] = {
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        **_QWEN3,
    ),
    "Qwen3-32B": Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        **_QWEN3,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        **_EXPERTS,
        **_QWEN3,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        **_EXPERTS,
        **_QWEN3,
    ),
}


@dataclass(frozen=True)
class Counts:
    """Properties of a model's shape that determine its times.

    Attributes:
        parameters: number of parameters; tied ones count once.
        body: weights outside the head that each token multiplies with; of the experts, only the chosen ones.
        experts: weights of all experts.
        chosen: share of the experts that each token uses.
        head: weights of the output head.
        layers: number of decoder layers.
        attention: number of query heads times their size.
        kv_elements: cached elements per token.
        mxfp8_bytes: bytes of a full weight update in MXFP8, with unquantized parameters in BF16.
        tensors: number of tensors in a checkpoint with packed experts.
    """

    parameters: int
    body: int
    experts: int
    chosen: float
    head: int
    layers: int
    attention: int
    kv_elements: int
    mxfp8_bytes: int
    tensors: int

    def unquantized_bytes(self, itemsize: int) -> int:
        """Return the bytes of a full weight update without quantization."""
        return self.parameters * itemsize


def count(config: PretrainedConfig) -> Counts:
    """Count for a transformers config of a decoder, with or without experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    tensors = {name: TensorInfo(shape, "BF16") for name, shape in shapes.items()}
    layers = read_layers(CheckpointIndex(Path("shape"), config.to_dict(), tensors))
    description = AscendDescription("shape", 1, layers, tensors)
    sizes = [(layer, math.prod(layer.info.shape)) for layer in layers]
    experts = sum(size for layer, size in sizes if layer.experts)
    chosen = config.num_experts_per_tok / config.num_experts if experts else 0.0
    head = config.vocab_size * config.hidden_size
    matrices = sum(size for layer, size in sizes if len(layer.info.shape) == 2 and "layers." in layer.name)
    dense = matrices - sum(size for layer, size in sizes if layer.experts and len(layer.info.shape) == 2)
    return Counts(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        body=dense + round(experts * chosen),
        experts=experts,
        chosen=chosen,
        head=head,
        layers=config.num_hidden_layers,
        attention=config.num_attention_heads * config.head_dim,
        kv_elements=2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        mxfp8_bytes=description.engine_bytes(2),
        tensors=len(shapes),
    )
