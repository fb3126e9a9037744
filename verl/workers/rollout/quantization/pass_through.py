"""Weights that are sent and loaded as they are: `rollout.quantization=null` and `torchao`."""

from __future__ import annotations

from verl.utils.quantization_scheme import QuantizationScheme


class PassThroughScheme(QuantizationScheme):
    """With torchao, vLLM's layer-wise reload quantizes each layer again after each update."""
