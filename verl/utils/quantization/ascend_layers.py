"""The weights of a checkpoint: which of them can be quantized, and how tensor parallelism cuts them.

All knowledge about names is in the tables at the top: names of projections, and layers that vllm-ascend keeps in BF16.
A layer that is in no table stays unquantized, with the reason `UNKNOWN`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.model_dir.safetensors_header import TensorInfo
from verl.utils.quantization.formats import FLOAT, MX_BLOCK_SIZE, W4A8_MXFP, W8A8_MXFP8

COLUMN, ROW, REPLICATED = "column", "row", "replicated"

# How vLLM cuts a projection over tensor-parallel ranks: "column" cuts its outputs (N), "row" its inputs (K). Blocks run
# along the inputs.
SPLITS = {
    "q_proj": COLUMN,
    "k_proj": COLUMN,
    "v_proj": COLUMN,
    "qkv_proj": COLUMN,
    "q_b_proj": COLUMN,
    "gate_proj": COLUMN,
    "up_proj": COLUMN,
    "gate_up_proj": COLUMN,
    "w1": COLUMN,
    "w3": COLUMN,
    "o_proj": ROW,
    "down_proj": ROW,
    "w2": ROW,
    "q_a_proj": REPLICATED,
    "kv_a_proj_with_mqa": REPLICATED,
}

# Checkpoint modules that vLLM packs into one: all modules of a row are quantized, or none.
PACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "shared_head"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_TOWERS = re.compile(r"(^|\.)(visual|vision\w*|vit|image\w*|audio\w*|multi_modal_projector|mm_projector)(\.|$)")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)$")
_FUSED_EXPERTS = re.compile(r"^(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)(\.weight)?$")
# All experts of a layer in Granite's checkpoints; vLLM's loader takes weights apart only.
_SPLIT_EXPERTS = ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")

VECTOR = "vector"
EMBEDDING = "embedding"
HEAD = "output head"
TOWER = "vision or audio tower"
OUTSIDE = "outside the decoder"
PREDICTION = "multi-token prediction layer"
ROUTER = "router"
NOT_MATRIX = "not a matrix"
ABSORBED = "vllm-ascend absorbs it into attention"
UNKNOWN = "unknown kind of layer"
IGNORED = "left out by ignore"
DESCRIBED = "FLOAT in the description"
UNFIT = "sizes that the engine cannot hold"
SENSITIVE = "left out by the budget"

# A description may not quantize layers with these reasons. With another reason it may: its author can know more about
# the engine than the tables above.
NEVER = {VECTOR, EMBEDDING, HEAD, PREDICTION, ROUTER, NOT_MATRIX, ABSORBED}


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight of a checkpoint.

    Attributes:
        name: the module, such as `model.layers.0.self_attn.q_proj`; for fused experts the parameter, without `.weight`.
        parameter: name of the tensor in the checkpoint.
        info: stored shape, [N, K] or, for fused experts, [E, N, K] or [E, K, N]; dtype.
        split: "column", "row" or "replicated" by the table above; empty if unknown.
        reason: why it stays unquantized; empty if it is quantized.
        scheme: its format if it is quantized, W8A8_MXFP8 or W4A8_MXFP.
        axis: the dimension that the matrix product sums over (K), -1 or -2.
        experts: the module that holds the experts of a MoE layer; empty for any other layer.
        expert: number of the expert, 0 for fused experts; None for any other layer.
    """

    name: str
    parameter: str
    info: TensorInfo
    split: str = ""
    reason: str = ""
    scheme: str = W8A8_MXFP8
    axis: int = -1
    experts: str = ""
    expert: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether the engine holds it quantized."""
        return not self.reason

    @property
    def described_as(self) -> str:
        """Its entry in a description: the scheme, or FLOAT."""
        return self.scheme if self.quantized else FLOAT

    @property
    def k(self) -> int:
        """Length of the dimension that blocks run along."""
        return self.info.shape[self.axis]

    @property
    def engine_nbytes(self) -> int:
        """Bytes in the engine: 1 byte per weight (W4A8_MXFP: half) plus the scales; unquantized layers as stored."""
        if not self.quantized:
            return self.info.nbytes
        elements = math.prod(self.info.shape)
        values = elements // 2 if self.scheme == W4A8_MXFP else elements
        return values + elements // self.k * math.ceil(self.k / MX_BLOCK_SIZE)

    @property
    def packed_with(self) -> str:
        """The common name of the layers that the engine packs into one, for example q, k and v; else ""."""
        if self.experts:
            return self.experts
        parent, _, last = self.name.rpartition(".")
        row = next((row for row in PACKED if last in row), None)
        return f"{parent}.{{{','.join(row)}}}" if row else ""

    def description_keys(self) -> tuple[str, ...]:
        """Keys of the layer in a description; none for experts after the first, which describes them all."""
        if not self.experts:
            return (f"{self.name}.weight",)
        if self.expert:
            return ()
        if _EXPERT.match(self.name):
            names = [self.name]
        elif self.name.endswith("gate_up_proj"):
            names = [f"{self.experts}.0.gate_proj", f"{self.experts}.0.up_proj"]
        else:
            names = [f"{self.experts}.0.down_proj"]
        # A release without a packing table for the model type looks up the experts' module itself.
        return (*(f"{name}.weight" for name in names), f"{self.experts}.weight")


def name_pattern(name: str) -> str:
    """Replace the numbers in a module name with `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def read_layers(index: CheckpointIndex) -> tuple[Layer, ...]:
    """Return every weight of a checkpoint, the projections of the decoder marked as quantized.

    Raises:
        ValueError: the decoder cannot be found, or has fewer layers than the config says; fused experts whose shape
            does not fit the config.
    """
    decoder = _decoder_prefix(index)
    count = index.text_config.get("num_hidden_layers")
    if not isinstance(count, int):
        raise ValueError(f"{index.model_dir}/config.json: num_hidden_layers={count!r}, expected a number of layers")
    pattern = re.compile(re.escape(decoder) + r"layers\.(\d+)\.")
    layers, seen = [], set()
    for name, info in index.tensors.items():
        match = pattern.match(name)
        number = int(match[1]) if match else None
        seen.add(number)
        layer = _layer(index, name, info, number, count)
        if layer is not None:
            layers.append(layer)
    missing = sorted(set(range(count)) - seen)
    if missing:
        raise ValueError(
            f"{index.model_dir}: config.json says num_hidden_layers={count}, the checkpoint has no {decoder}layers."
            f"{missing[0]} ({len(missing)} such): it is incomplete, or the config belongs to another model"
        )
    if not any(layer.name.rpartition(".")[2] == "lm_head" for layer in layers):
        # A tied head is stored once, under the name of the embedding; the engine may still look it up.
        embedding = next(layer for layer in layers if layer.name == f"{decoder}embed_tokens")
        layers.append(
            Layer("lm_head", "lm_head.weight", TensorInfo((0, *embedding.info.shape[1:]), "BF16"), reason=HEAD)
        )
    return tuple(layers)


def _decoder_prefix(index: CheckpointIndex) -> str:
    """Return the prefix (such as `model.`) that the embedding and the first layer share."""
    suffix = "embed_tokens.weight"
    prefixes = [name.removesuffix(suffix) for name in index.tensors if name.endswith(suffix)]
    decoders = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}layers.0.") for name in index.tensors)]
    if len(decoders) != 1:
        raise ValueError(
            f"{index.model_dir}: expected one decoder (<prefix>.embed_tokens.weight next to <prefix>.layers.0), found "
            f"{decoders or 'none'}; models of type {index.config.get('model_type')!r} cannot be quantized: set "
            "actor_rollout_ref.rollout.quantization=null"
        )
    return decoders[0]


def _layer(index: CheckpointIndex, name: str, info: TensorInfo, number: int | None, count: int) -> Layer | None:
    """Return the layer of a weight; None for biases, buffers and the like."""
    fused = _FUSED_EXPERTS.match(name) if len(info.shape) == 3 else None
    if not name.endswith(".weight") and not fused:
        return None
    module = name.removesuffix(".weight")
    if len(info.shape) == 3 and module.endswith(_SPLIT_EXPERTS):
        raise ValueError(
            f"{index.model_dir}: {name} {list(info.shape)}: vLLM quantizes these experts, but takes them apart without "
            f"their scales; models of type {index.config.get('model_type')!r} cannot be quantized: set "
            "actor_rollout_ref.rollout.quantization=null"
        )
    expert = _EXPERT.match(module)
    last = module.rpartition(".")[2]
    reason = _reason(module, info, number, count, fused is not None)
    options: dict[str, Any] = {"split": SPLITS.get(last, ""), "reason": reason}
    if expert:
        options |= {"experts": expert["experts"], "expert": int(expert["index"])}
    elif fused:
        options |= {"experts": fused["experts"], "expert": 0}
        if not reason:
            options["axis"] = _fused_axis(index, fused["experts"])
    return Layer(module, name, info, **options)


def _reason(module: str, info: TensorInfo, number: int | None, count: int, fused: bool) -> str:
    """Return why a weight stays unquantized, or an empty string."""
    last = module.rpartition(".")[2]
    in_layer = number is not None
    tests = (
        (len(info.shape) < 2, VECTOR),
        (last in _EMBEDDINGS, EMBEDDING),
        (not _HEADS.isdisjoint(module.split(".")), HEAD),
        (not in_layer and _TOWERS.search(module) is not None, TOWER),
        (not in_layer, OUTSIDE),
        (number is not None and number >= count, PREDICTION),
        (last in _ROUTERS, ROUTER),
        (len(info.shape) != 2 and not fused, NOT_MATRIX),
        (last == "kv_b_proj", ABSORBED),
        (last not in SPLITS, UNKNOWN),
    )
    return next((reason for applies, reason in tests if applies), "")


def _fused_axis(index: CheckpointIndex, experts: str) -> int:
    """Return the dimension of K in a layer's fused experts: -1 for [E, 2I, H] and [E, H, I], -2 for their transposes.

    One of the two tensors can be square and fit both ways, but never both of them (2I = H and I = H).
    """
    found = {}
    for projection in ("gate_up_proj", "down_proj"):
        info = index.tensors.get(f"{experts}.{projection}") or index.tensors.get(f"{experts}.{projection}.weight")
        found[projection] = info.shape if info else None
    config: Mapping[str, Any] = index.text_config
    hidden = config.get("hidden_size")
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    if found["gate_up_proj"] and found["down_proj"] and isinstance(hidden, int) and isinstance(width, int):
        gate_up, down = found["gate_up_proj"][1:], found["down_proj"][1:]
        if gate_up == (2 * width, hidden) and down == (hidden, width):
            return -1
        if gate_up == (hidden, 2 * width) and down == (width, hidden):
            return -2
    raise ValueError(
        f"{index.model_dir}: {experts}: gate_up_proj {found['gate_up_proj']} and down_proj {found['down_proj']} do not "
        f"fit hidden_size={hidden} and moe_intermediate_size={width} of config.json"
    )
