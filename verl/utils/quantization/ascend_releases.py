"""The installed release of vllm-ascend, and limits of releases that are checked before an engine fails on them.

In the kernel layout the scales of two groups are adjacent. Release 0.18 pairs them without padding, for every layer;
releases up to 0.26 do so for experts. Measured with the code of 0.18.0, 0.23.0 and 0.26.0rc1: `test_groups.py` in
tests/contract/vllm_ascend/inside. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import import_module, metadata

from packaging.version import Version

from verl.utils.quantization.ascend_layers import ROW, Layer
from verl.utils.quantization.formats import MX_BLOCK_SIZE

OLDEST_VLLM_ASCEND = "0.18.0"
_FIELD = "actor_rollout_ref.rollout.quantization"
_PAIR = 2 * MX_BLOCK_SIZE
# The first release that is known to pad linear layers, and the first whose code for experts was not read.
_PADS_LINEAR, _MAY_PAD_EXPERTS = Version("0.23.0"), Version("0.27.0")
# The newest release whose code was read.
NEWEST_READ = "0.26.0"


def check_vllm_ascend() -> str:
    """Return the version of the installed vllm-ascend after checking that it can run MXFP8.

    Raises:
        ValueError: it is missing, older than 0.18.0, or built for another processor than the Ascend 950.
    """
    setting = f"{_FIELD}=ascend"
    try:
        version = metadata.version("vllm-ascend")
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{setting}: vllm-ascend is not installed; install {OLDEST_VLLM_ASCEND} or newer, built with "
            "SOC_VERSION=ascend950..."
        ) from None
    if Version(version) < Version(OLDEST_VLLM_ASCEND):
        raise ValueError(f"{setting}: vllm-ascend {version} is too old; install {OLDEST_VLLM_ASCEND} or newer")
    try:
        built_for = getattr(import_module("vllm_ascend._build_info"), "__device_type__", "unknown")
    except ImportError:
        built_for = "unknown"
    # Some releases store the name of an enum member, others the qualified name.
    if str(built_for).rpartition(".")[2] != "A5":
        raise ValueError(
            f"{setting}: this vllm-ascend {version} was built for device type {built_for}, MXFP8 needs an Ascend 950 "
            "(A5); build it with SOC_VERSION=ascend950..."
        )
    return version


def validate_paired_groups(layers: Iterable[Layer], tp_size: int, release: str) -> None:
    """Check that each quantized layer has an even number of groups of 32 inputs, if the release needs that.

    Args:
        layers: the layers of a description, see `ascend_description`.
        tp_size: tensor-parallel size of the rollout.
        release: version of vllm-ascend.

    Raises:
        ValueError: a layer that does not fit: its name, its inputs on one rank, and what to do.
    """
    version = Version(release)
    for layer in layers:
        if not layer.quantized:
            continue
        inputs = layer.k // tp_size if layer.split == ROW else layer.k
        # A release candidate has the code of its release.
        if inputs % _PAIR and Version(version.base_version) < (_MAY_PAD_EXPERTS if layer.experts else _PADS_LINEAR):
            ignored = {"ignore": [f"re:{re.escape(layer.experts)}\\..*" if layer.experts else layer.name]}
            newer = "" if layer.experts else f"use vllm-ascend {_PADS_LINEAR} or newer, or "
            raise ValueError(
                f"{_FIELD}=ascend: {layer.name} {list(layer.info.shape)} has {inputs} "
                f"inputs on a rank (tensor_model_parallel_size={tp_size}); vllm-ascend {release} takes multiples of "
                f"{_PAIR} {'in experts ' if layer.experts else ''}only: {newer}leave it out: {json.dumps(ignored)} in "
                f"{_FIELD}_config_file"
            )
