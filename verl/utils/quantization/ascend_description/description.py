"""The description itself: the weights of a checkpoint, each quantized or with the reason why it is not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.byte_size import format_bytes
from verl.utils.model_dir.safetensors_header import TensorInfo
from verl.utils.quantization.ascend_layers import Layer
from verl.utils.quantization.formats import ASCEND_SCHEMES, MXFP8_DESCRIPTION, WEIGHT_FORMATS

DESCRIPTION_FILE = "quant_model_description.json"
# Parameters that vLLM holds in float32, whatever its dtype: router biases, decay rates of linear attention.
_IN_FLOAT32 = ("e_score_correction_bias", ".A_log")


@dataclass(frozen=True)
class AscendDescription:
    """The weights of a checkpoint that the engine holds in MXFP8 or MXFP4.

    Attributes:
        model_dir: directory of the checkpoint.
        tp_size: tensor-parallel size of the rollout that it was checked for.
        layers: every weight of the checkpoint, in its order.
        parameters: every tensor of the checkpoint by name, biases and buffers included.
    """

    model_dir: str
    tp_size: int
    layers: tuple[Layer, ...]
    parameters: Mapping[str, TensorInfo] = field(repr=False, hash=False)
    _by_parameter: dict[str, Layer] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_parameter", {layer.parameter: layer for layer in self.layers})

    @property
    def quantized_layers(self) -> tuple[str, ...]:
        """Quantized checkpoint modules such as `model.layers.0.self_attn.q_proj`; for fused experts, parameters."""
        return tuple(layer.name for layer in self.layers if layer.quantized)

    def layer(self, weight_name: str) -> Layer | None:
        """Return the layer of a checkpoint tensor; None for biases, buffers and the like.

        Raises:
            ValueError: the checkpoint has no tensor of that name.
        """
        layer = self._by_parameter.get(weight_name)
        if layer is None and weight_name not in self.parameters:
            raise ValueError(
                f"{weight_name!r} is not in the checkpoint that the description was made from ({self.model_dir})"
                f"{similar_name(weight_name, self.parameters)}"
            )
        return layer

    def is_quantized(self, weight_name: str) -> bool:
        """Return whether the engine holds a checkpoint tensor quantized; ValueError for an unknown name."""
        layer = self.layer(weight_name)
        return layer is not None and layer.quantized

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of its layers: W8A8_MXFP8, W4A8_MXFP or both."""
        used = {layer.scheme for layer in self.layers if layer.quantized}
        return tuple(scheme for scheme in ASCEND_SCHEMES if scheme in used)

    @property
    def weight_formats(self) -> str:
        """The number formats of its quantized layers, for example `MXFP8` or `MXFP8 and MXFP4`."""
        return " and ".join(WEIGHT_FORMATS[scheme] for scheme in self.schemes)

    def summary(self) -> str:
        """Return one line: the number of quantized weights, and the bytes of all weights, stored and in the engine."""
        before = sum(layer.info.nbytes for layer in self.layers)
        after = sum(layer.engine_nbytes for layer in self.layers)
        return (
            f"{len(self.quantized_layers)} of {len(self.layers)} weights, tensor-parallel size {self.tp_size}: "
            f"{format_bytes(before)} stored, {format_bytes(after)} in the engine ({after / before:.0%})"
        )

    def engine_bytes(self, itemsize: int) -> int:
        """Bytes of all tensors, with `itemsize` bytes per element of unquantized ones that are not `_IN_FLOAT32`."""
        encoded = {layer.parameter: layer.engine_nbytes for layer in self.layers if layer.quantized}
        return sum(
            encoded.get(name) or math.prod(info.shape) * (4 if name.endswith(_IN_FLOAT32) else itemsize)
            for name, info in self.parameters.items()
        )

    def to_json_dict(self) -> dict[str, Any]:
        """Return `hf_overrides["quantization_config"]`: plain strings and numbers, keyed by checkpoint names.

        The first expert of each layer describes them all: vllm-ascend looks at no other.
        """
        entries: dict[str, str] = {}
        for layer in self.layers:
            entries |= dict.fromkeys(layer.description_keys(), layer.described_as)
        return {**MXFP8_DESCRIPTION, "model_quant_type": self.schemes[0], **entries}


def similar_name(name: str, names: Iterable[str]) -> str:
    """Return ` (similar: 'NAME')` for an error message, or an empty string if no name is close."""
    close = difflib.get_close_matches(name.removeprefix("re:"), names, n=1)
    return f" (similar: {close[0]!r})" if close else ""
