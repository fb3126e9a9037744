"""The installed release of vllm-ascend, and limits of releases that are checked before an engine fails on them.

In the kernel layout the scales of two groups are adjacent. Release 0.18 pairs them without padding, for every layer;
all releases do so for experts. Measured with the code of 0.18.0, 0.23.0, 0.26.0rc1, 0.28.0rc1 and 0.30.0rc2:
`test_groups.py` in tests/contract/vllm_ascend/inside. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import import_module, metadata

from packaging.version import Version

from verl.utils.quantization.ascend_layers import COLUMN, ROW, Layer
from verl.utils.quantization.formats import MX_BLOCK_SIZE, W4A8_MXFP

OLDEST_VLLM_ASCEND = "0.18.0"
_FIELD = "actor_rollout_ref.rollout.quantization"
_PAIR = 2 * MX_BLOCK_SIZE
# The first release that is known to pad the scales of linear layers.
_PADS_LINEAR = Version("0.23.0")
# The first release that pads a share of a row-parallel layer that begins or ends inside a group.
_PADS_SHARES = Version("0.28.0")
# The first release that looks up the exact name of a layer in the description.
_EXACT_NAMES = Version("0.27.0")
# The first release that can restore the checkpoint layout of W4A8_MXFP layers, and the rows of a block of FRACTAL_NZ,
# in which it holds their weights.
_RELOADS_MXFP4, _NZ_ROWS = Version("0.28.0"), 16
# The newest release whose code was read and run. No release up to it pads the scales of experts.
NEWEST_READ, NEWEST_TESTED = "0.30.0", "0.30.0rc2"


def installed_vllm_ascend() -> str | None:
    """Return the version of the installed vllm-ascend; None if it is not installed."""
    try:
        return metadata.version("vllm-ascend")
    except metadata.PackageNotFoundError:
        return None


def _final(release: str) -> Version:
    """Return the version without the suffix of a candidate, which has the code of its release."""
    return Version(Version(release).base_version)


def pads_shares(release: str) -> bool:
    """Return whether a rank's share of a row-parallel linear layer may begin or end inside a group of 32 inputs."""
    return _final(release) >= _PADS_SHARES


def reads_exact_names(release: str) -> bool:
    """Return whether a release tells a layer from one whose name starts with the layer's name."""
    return _final(release) >= _EXACT_NAMES


def untested_release(release: str) -> str | None:
    """Return a warning for a release that is newer than those whose code was run; None for others."""
    if _final(release) <= Version(NEWEST_READ):
        return None
    return (
        f"vllm-ascend {release} is newer than the newest release tested with verl, {NEWEST_TESTED}: the engine starts "
        "only after a self-test, and if its weights have the known layouts and memory format"
    )


def check_vllm_ascend() -> str:
    """Return the version of the installed vllm-ascend after checking that it can run MXFP8.

    Raises:
        ValueError: it is missing, older than 0.18.0, or built for another processor than the Ascend 950.
    """
    setting = f"{_FIELD}=ascend"
    version = installed_vllm_ascend()
    if version is None:
        raise ValueError(
            f"{setting}: vllm-ascend is not installed; install {OLDEST_VLLM_ASCEND} or newer, built with "
            "SOC_VERSION=ascend950..."
        )
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


def validate_paired_groups(
    layers: Iterable[Layer], tp_size: int, release: str, *, expert_parallel: bool = False
) -> None:
    """Check that each quantized layer has an even number of groups of 32 inputs, if the release needs that.

    Args:
        layers: the layers of a description, see `ascend_description`.
        tp_size: tensor-parallel size of the rollout.
        release: version of vllm-ascend.
        expert_parallel: each rank holds whole experts instead of a slice of each.

    Raises:
        ValueError: a layer that does not fit: its name, its inputs on one rank, and what to do.
    """
    version = _final(release)
    for layer in layers:
        if not layer.quantized:
            continue
        cut = layer.split == ROW and not (layer.experts and expert_parallel)
        inputs = layer.k // tp_size if cut else layer.k
        fails = version <= Version(NEWEST_READ) if layer.experts else version < _PADS_LINEAR
        if inputs % _PAIR and fails:
            ignored = {"ignore": [f"re:{re.escape(layer.experts)}\\..*" if layer.experts else layer.name]}
            newer = "" if layer.experts else f"use vllm-ascend {_PADS_LINEAR} or newer, or "
            if layer.experts and cut and layer.k % _PAIR == 0:
                newer = f"use actor_rollout_ref.rollout.expert_parallel_size={tp_size}, or "
            raise ValueError(
                f"{_FIELD}=ascend: {layer.name} {list(layer.info.shape)} has {inputs} "
                f"inputs on a rank (tensor_model_parallel_size={tp_size}); vllm-ascend {release} takes multiples of "
                f"{_PAIR} {'in experts ' if layer.experts else ''}only: {newer}leave it out: {json.dumps(ignored)} in "
                f"{_FIELD}_config_file"
            )


def validate_mxfp4(layers: Iterable[Layer], tp_size: int, release: str, *, expert_parallel: bool = False) -> None:
    """Check that the release can replace the weights of W4A8_MXFP layers.

    An update copies a weight into the memory that graphs were captured with. torch_npu copies the memory of FRACTAL_NZ
    as it is only if its blocks of 16 rows have no padding.

    Args:
        layers, tp_size, release, expert_parallel: as of `validate_paired_groups`.

    Raises:
        ValueError: the release is too old, or a layer whose outputs do not fit; what to do.
    """
    for layer in layers:
        if layer.described_as != W4A8_MXFP:
            continue
        if _final(release) < _RELOADS_MXFP4:
            raise ValueError(
                f"{_FIELD}=ascend: {layer.name} is {W4A8_MXFP}, and vllm-ascend {release} cannot replace such weights: "
                f"use vllm-ascend {_RELOADS_MXFP4} or newer, or W8A8_MXFP8 ({_FIELD}_scheme, {_FIELD}_config_file)"
            )
        cut = layer.split == COLUMN and not (layer.experts and expert_parallel)
        outputs = layer.info.shape[-2] / (tp_size if cut else 1)
        if outputs % _NZ_ROWS:
            raise ValueError(
                f"{_FIELD}=ascend: {layer.name} {list(layer.info.shape)} is {W4A8_MXFP} and has {outputs:g} outputs on "
                f"a rank (tensor_model_parallel_size={tp_size}), must be a multiple of {_NZ_ROWS}: give it another "
                f"value in {_FIELD}_config_file"
            )
