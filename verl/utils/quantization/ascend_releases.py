"""What a release of vllm-ascend cannot hold in MXFP8, found before an engine fails on it.

The scales of two groups lie next to each other at run time. 0.18 pairs them without padding, for every layer; releases
up to 0.26 do so for experts. Measured with the code of 0.18.0, 0.23.0 and 0.26.0rc1: `test_groups.py` in
tests/contract/vllm_ascend/inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from packaging.version import Version

from verl.utils.quantization.ascend_layers import MX_BLOCK_SIZE, ROW, Layer

_PAIR = 2 * MX_BLOCK_SIZE
# The first release that was seen to pad linear layers, and the first whose experts were not read.
_PADS_LINEAR, _MAY_PAD_EXPERTS = Version("0.23.0"), Version("0.27.0")
# The newest release whose code was read.
NEWEST_READ = "0.26.0"


def validate_unpaired_groups(layers: Iterable[Layer], tp_size: int, release: str) -> None:
    """Refuse quantized layers whose groups of 32 inputs do not pair, where the release needs that.

    Args:
        layers: of a description, see `ascend_description`.
        tp_size: the rollout's tensor-parallel size.
        release: version of vllm-ascend.

    Raises:
        ValueError: naming the layer, its inputs on a rank and what to do.
    """
    version = Version(release)
    for layer in layers:
        if not layer.quantized:
            continue
        inputs = layer.k // tp_size if layer.split == ROW else layer.k
        # A candidate of a release has the release's code.
        if inputs % _PAIR and Version(version.base_version) < (_MAY_PAD_EXPERTS if layer.experts else _PADS_LINEAR):
            ignored = {"ignore": [f"re:{re.escape(layer.experts)}\\..*" if layer.experts else layer.name]}
            newer = "" if layer.experts else f"use vllm-ascend {_PADS_LINEAR} or newer, or "
            raise ValueError(
                f"actor_rollout_ref.rollout.quantization=ascend: {layer.name} {list(layer.info.shape)} has {inputs} "
                f"inputs on a rank (tensor_model_parallel_size={tp_size}); vllm-ascend {release} takes multiples of "
                f"{_PAIR} {'in experts ' if layer.experts else ''}only: {newer}leave it out: {json.dumps(ignored)} in "
                "actor_rollout_ref.rollout.quantization_config_file"
            )
