"""Reads descriptions: ModelSlim's files, files with an `ignore` list, and the one of a model directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.utils.model_dir.index import CheckpointIndex, read_checkpoint_index, read_json_object
from verl.utils.quantization.ascend_description.build import build_description
from verl.utils.quantization.ascend_description.description import DESCRIPTION_FILE, AscendDescription, similar_name
from verl.utils.quantization.ascend_description.validation import (
    FIELD,
    SCHEME_FIELD,
    validate_unquantized,
    validated_description,
)
from verl.utils.quantization.ascend_layers import DESCRIBED, NEVER, Layer, read_layers
from verl.utils.quantization.formats import ASCEND_METHOD, ASCEND_SCHEMES, FLOAT, MX_BLOCK_SIZE, W8A8_MXFP8

logger = logging.getLogger(__name__)

# Fields that are not about a layer, with their possible values.
# Tuples, because a value of the file may be a list, which no set can look for.
_METADATA: dict[str, tuple[Any, ...]] = {
    "quant_method": (ASCEND_METHOD,),
    "group_size": (MX_BLOCK_SIZE,),
    "model_quant_type": (*ASCEND_SCHEMES, FLOAT),
}
_INFORMATIVE = {"version", "metadata"}
# Each of these switches quantization of the KV cache on.
_KV_FIELDS = ("fa_quant_type", "indexer_quant_type", "kv_cache_type")
_KV_ENTRIES = (".scale", ".offset", ".quant_type", ".kv_cache_scale", ".kv_cache_offset")


def load_description(
    path: str | Path,
    model_dir: str | Path,
    tp_size: int = 1,
    *,
    expert_parallel: bool = False,
    padded_shares: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """Read a `quant_model_description.json`, from ModelSlim or from `verl describe`, and check it.

    A weight without an entry is FLOAT if it cannot be quantized. A projection without an entry is an error.

    Raises:
        ValueError: the file is damaged, describes another model or only a part of this one, has other values than
            W8A8_MXFP8, W4A8_MXFP and FLOAT, or fails a check of `build_description`.
    """
    index = index or read_checkpoint_index(model_dir)
    raw = read_json_object(Path(path), unique_keys=True)
    return _load(Path(path), raw, index, tp_size, expert_parallel, padded_shares)


def resolve_description(
    model_dir: str | Path,
    quantization_config_file: str | Path | None = None,
    tp_size: int = 1,
    *,
    scheme: str | None = None,
    expert_parallel: bool = False,
    padded_shares: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """Return the description to use: from the given file, else from the model directory, else a built one.

    Args:
        quantization_config_file: JSON, either `{"ignore": [...]}` (see `build_description`) or a ModelSlim description.
        scheme: for every layer of a built description, see `build_description`; None for W8A8_MXFP8.
        padded_shares: see `build_description`.

    Raises:
        ValueError: as `build_description` and `load_description`; a scheme beside a description from a file.
    """
    index = index or read_checkpoint_index(model_dir)
    options: Any = {"expert_parallel": expert_parallel, "padded_shares": padded_shares, "index": index}
    own = Path(model_dir) / DESCRIPTION_FILE
    if quantization_config_file is not None:
        path = Path(quantization_config_file)
        raw = read_json_object(path, unique_keys=True)
        if "ignore" not in raw:
            logger.info("per-layer description: %s", path)
            return _load(path, raw, index, tp_size, expert_parallel, padded_shares)
        logger.info("per-layer description: derived from %s, without the layers in %s", model_dir, path)
        ignore = _ignore_list(path, raw)
        return build_description(model_dir, tp_size=tp_size, ignore=ignore, **options)
    if own.is_file():
        if scheme is not None:
            raise ValueError(
                f"{SCHEME_FIELD}={scheme}: {own} already describes the layers; remove the key, or the file"
            )
        logger.info("per-layer description: %s", own)
        return load_description(own, model_dir, tp_size, **options)
    logger.info("per-layer description: derived from %s", model_dir)
    return build_description(model_dir, tp_size=tp_size, scheme=scheme or W8A8_MXFP8, **options)


def _ignore_list(path: Path, raw: Mapping[str, Any]) -> list[str]:
    others = sorted(raw.keys() - {"ignore"})
    if others:
        raise ValueError(
            f"{FIELD}={path}: has {', '.join(others[:3])} next to 'ignore'; give either {{'ignore': [...]}} or a "
            "ModelSlim description"
        )
    ignore = raw["ignore"]
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise ValueError(f"{FIELD}={path}: ignore={ignore!r}, expected a list of names and 're:' patterns")
    return ignore


def _load(
    path: Path,
    raw: Mapping[str, Any],
    index: CheckpointIndex,
    tp_size: int,
    expert_parallel: bool,
    padded_shares: bool,
) -> AscendDescription:
    validate_unquantized(index)
    types = _described_types(path, raw)
    layers = read_layers(index)
    _validate_names(path, types, layers, index)
    described = [_as_described(path, layer, types, tp_size) for layer in layers]
    return validated_description(index, described, tp_size, expert_parallel, padded_shares)


def _described_types(path: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    """Return module name -> quantization type. Raise if another field of the file is invalid."""
    types: dict[str, str] = {}
    for key, value in raw.items():
        if key in _METADATA:
            if value not in _METADATA[key]:
                allowed = " or ".join(repr(known) for known in sorted(_METADATA[key], key=str))
                raise ValueError(f"{path}: {key}={value!r} is not supported: must be {allowed}")
        elif key in _KV_FIELDS or key.endswith(_KV_ENTRIES):
            raise ValueError(f"{path}: {key}={value!r}: quantized KV caches are not supported; remove the entry")
        elif key in _INFORMATIVE:
            continue
        elif "." not in key or not key.strip(".") or (not isinstance(value, str) and not key.endswith(".weight")):
            raise ValueError(f"{path}: unknown field {key}={value!r:.80}; remove it")
        elif value not in (*ASCEND_SCHEMES, FLOAT):
            supported = f"{', '.join(ASCEND_SCHEMES)} and {FLOAT}"
            raise ValueError(f"{path}: {key} is {value!r:.80}; only {supported} are supported")
        else:
            module, _, tensor = key.rpartition(".")
            # Entries for a module's other tensors (bias, weight_scale) repeat the entry of its weight.
            if tensor == "weight":
                types[module] = value
            else:
                types.setdefault(module, value)
    if not types:
        raise ValueError(f"{path}: describes no layer; delete it to have one derived, or give a complete description")
    return types


def _validate_names(path: Path, types: Mapping[str, str], layers: Sequence[Layer], index: CheckpointIndex) -> None:
    """Reject a description with modules that the checkpoint does not have."""
    known = {layer.name for layer in layers} | {name.rpartition(".")[0] for name in index.tensors}
    known |= {key.removesuffix(".weight") for layer in layers for key in layer.description_keys()}
    unknown = [name for name in types if name not in known]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(types)} layers are not in the checkpoint {index.model_dir} (the "
            f"first: {unknown[0]}{similar_name(unknown[0], known)}): it describes another model"
        )


def _as_described(path: Path, layer: Layer, types: Mapping[str, str], tp_size: int) -> Layer:
    """Return the layer, quantized or not as the description says; without an entry it is FLOAT if it must be."""
    what = f"{path}: {layer.name} {list(layer.info.shape)}"
    keys = layer.description_keys()
    if not keys and layer.name not in types:
        keys = (f"{layer.experts}.0.{layer.name.rpartition('.')[2]}.weight",)
    kinds = {types[name] for name in (layer.name, *(key.removesuffix(".weight") for key in keys)) if name in types}
    if len(kinds) > 1:
        raise ValueError(f"{what}: its entries ({', '.join(keys)}) differ: {sorted(kinds)}; give them one value")
    if not kinds and layer.quantized:
        raise ValueError(f"{what} is not described: add {keys[0]!r} as {W8A8_MXFP8!r} or another value")
    kind = kinds.pop() if kinds else FLOAT
    if kind == FLOAT:
        return replace(layer, reason=DESCRIBED) if layer.quantized else layer
    if layer.reason in NEVER:
        raise ValueError(f"{what} is {kind}, but cannot be ({layer.reason}); make it {FLOAT}")
    if layer.reason and tp_size > 1 and layer.k % (MX_BLOCK_SIZE * tp_size):
        raise ValueError(
            f"{what} is {kind}, but verl does not know how tensor parallelism cuts it, and its {layer.k} inputs "
            f"do not divide into blocks of {MX_BLOCK_SIZE} on tensor_model_parallel_size={tp_size}; make it {FLOAT}"
        )
    return replace(layer, reason="", scheme=kind)
