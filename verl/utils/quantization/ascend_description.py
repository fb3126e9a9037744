"""The per-layer description that vllm-ascend needs before an engine starts in MXFP8, made from a BF16 checkpoint.

vllm-ascend asks, for every linear layer it builds, for `<checkpoint module>.weight`: `W8A8_MXFP8` or `FLOAT`; a layer
without an entry is a KeyError inside the engine. A ModelSlim-quantized checkpoint brings these entries in
`quant_model_description.json`; for a BF16 checkpoint they are derived here from its config and the names, shapes and
dtypes of its tensors, and everything that the engine could only fail on later is refused here by name.

    verl describe MODEL_DIR --tp 2 --ignore 're:.*\\.o_proj' -o description.json
"""

from __future__ import annotations

import argparse
import bisect
import difflib
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text
from verl.utils.byte_size import format_bytes
from verl.utils.model_dir.index import CheckpointIndex, read_checkpoint_index, read_json_object
from verl.utils.model_dir.shapes_from_config import read_index_or_config
from verl.utils.quantization.ascend_layers import (
    DESCRIBED,
    IGNORED,
    MX_BLOCK_SIZE,
    NEVER,
    ROW,
    UNKNOWN,
    Layer,
    read_layers,
)

logger = logging.getLogger(__name__)

DESCRIPTION_FILE = "quant_model_description.json"
QUANTIZED, FLOAT = "W8A8_MXFP8", "FLOAT"
_FIELD = "actor_rollout_ref.rollout.quantization_config_file"
_FLOATING = {"F64", "F32", "F16", "BF16"}
_QUANTIZED_SUFFIXES = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight", ".weight_offset")
# What the engine's quantization reads besides layers; each of the second kind switches KV quantization on.
_METADATA = {
    "quant_method": {"ascend"},
    "group_size": {MX_BLOCK_SIZE},
    "model_quant_type": {QUANTIZED, FLOAT},
}
_INFORMATIVE = {"version", "metadata"}
_KV_FIELDS = ("fa_quant_type", "indexer_quant_type", "kv_cache_type")
_KV_ENTRIES = (".scale", ".offset", ".quant_type", ".kv_cache_scale", ".kv_cache_offset")


@dataclass(frozen=True)
class AscendDescription:
    """Which weights of a checkpoint the engine holds in MXFP8.

    Attributes:
        model_dir: where the checkpoint is.
        tp_size: the rollout's tensor-parallel size that it was checked for.
        layers: every weight of the checkpoint, in its order.
        parameters: every tensor of the checkpoint, biases and buffers included.
    """

    model_dir: str
    tp_size: int
    layers: tuple[Layer, ...]
    parameters: frozenset[str] = field(repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_by_parameter", {layer.parameter: layer for layer in self.layers})

    @property
    def quantized_layers(self) -> tuple[str, ...]:
        """Checkpoint modules (fused experts: parameters) that are quantized, as `model.layers.0.self_attn.q_proj`."""
        return tuple(layer.name for layer in self.layers if layer.quantized)

    def layer(self, weight_name: str) -> Layer | None:
        """The layer that a checkpoint tensor is the weight of; None for biases, buffers and the like.

        Raises:
            ValueError: the checkpoint has no tensor of that name.
        """
        layer = self._by_parameter.get(weight_name)
        if layer is None and weight_name not in self.parameters:
            raise ValueError(
                f"{weight_name!r} is not in the checkpoint that the description was made from ({self.model_dir})"
                f"{_similar(weight_name, self.parameters)}"
            )
        return layer

    def is_quantized(self, weight_name: str) -> bool:
        """Whether a checkpoint tensor goes to the engine in MXFP8; ValueError for a name that the checkpoint lacks."""
        layer = self.layer(weight_name)
        return layer is not None and layer.quantized

    def summary(self) -> str:
        """How many weights are quantized, and bytes of all of them as stored and in the engine."""
        before = sum(layer.info.nbytes for layer in self.layers)
        after = sum(layer.nbytes_after for layer in self.layers)
        return (
            f"{len(self.quantized_layers)} of {len(self.layers)} weights, tensor-parallel size {self.tp_size}: "
            f"{format_bytes(before)} stored, {format_bytes(after)} in the engine ({after / before:.0%})"
        )

    def sent_bytes(self, itemsize: int) -> int:
        """Bytes of all weights in MXFP8, the unquantized ones in `itemsize` bytes an element; biases left out."""
        return sum(la.nbytes_after if la.quantized else math.prod(la.info.shape) * itemsize for la in self.layers)

    def to_json_dict(self) -> dict[str, Any]:
        """What `hf_overrides["quantization_config"]` must be: plain strings and numbers, keyed by checkpoint names.

        Experts are described by the first of each layer, the only one that vllm-ascend looks at.
        """
        entries = {}
        for layer in self.layers:
            entries |= dict.fromkeys(layer.description_keys(), QUANTIZED if layer.quantized else FLOAT)
        return {"quant_method": "ascend", "model_quant_type": QUANTIZED, "group_size": MX_BLOCK_SIZE, **entries}

    def table(self) -> str:
        """Layers, alike ones in a row: count, shape, how tensor parallelism cuts them, bytes before and after."""
        return _render(self)


def build_description(
    model_dir: str | Path,
    *,
    tp_size: int = 1,
    ignore: Iterable[str] = (),
    expert_parallel: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """Describe a BF16 (or float32, float16) checkpoint, every projection of the decoder quantized.

    Args:
        model_dir: local Hugging Face directory.
        tp_size: the rollout's tensor-parallel size.
        ignore: modules to leave out: exact names (`model.layers.0.self_attn.q_proj`), or `re:` and a regular expression
            that has to match the whole name.
        expert_parallel: experts are dealt out to the ranks whole instead of being cut.
        index: what the directory holds, where it was read already or is implied by its config.

    Raises:
        ValueError: the checkpoint is damaged or already quantized; an `ignore` that matches nothing; shards of a packed
            layer that are not alike; inputs of a row-parallel layer that blocks of 32 do not divide among the ranks.
    """
    index = index or read_checkpoint_index(model_dir)
    _refuse_quantized(index)
    layers = _leave_out(read_layers(index), tuple(ignore))
    return _checked(index, layers, tp_size, expert_parallel)


def load_description(
    path: str | Path,
    model_dir: str | Path,
    tp_size: int = 1,
    *,
    expert_parallel: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """Read a ModelSlim `quant_model_description.json` (or what this module wrote) and check it against the checkpoint.

    Weights it does not mention are FLOAT if they have to be; a projection that it does not mention is an error.

    Raises:
        ValueError: the file is damaged, describes another model or not all of this one, asks for anything but
            W8A8_MXFP8 and FLOAT, or for what `build_description` would refuse.
    """
    index = index or read_checkpoint_index(model_dir)
    return _load(Path(path), read_json_object(Path(path)), index, tp_size, expert_parallel)


def resolve_description(
    model_dir: str | Path,
    quantization_config_file: str | Path | None = None,
    tp_size: int = 1,
    *,
    expert_parallel: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """The description to use: from the file if given, else from the model directory's own, else built.

    Args:
        quantization_config_file: JSON, either `{"ignore": [...]}` (see `build_description`) or a ModelSlim description.

    Raises:
        ValueError: as `build_description` and `load_description`.
    """
    index = index or read_checkpoint_index(model_dir)
    own = Path(model_dir) / DESCRIPTION_FILE
    if quantization_config_file is not None:
        path = Path(quantization_config_file)
        raw = read_json_object(path)
        if "ignore" not in raw:
            logger.info("per-layer description: %s", path)
            return _load(path, raw, index, tp_size, expert_parallel)
        logger.info("per-layer description: derived from %s, layers left out as in %s", model_dir, path)
        ignore = _ignore_list(path, raw)
        return build_description(
            model_dir, tp_size=tp_size, ignore=ignore, expert_parallel=expert_parallel, index=index
        )
    if own.is_file():
        logger.info("per-layer description: %s", own)
        return load_description(own, model_dir, tp_size, expert_parallel=expert_parallel, index=index)
    logger.info("per-layer description: derived from %s", model_dir)
    return build_description(model_dir, tp_size=tp_size, expert_parallel=expert_parallel, index=index)


def _ignore_list(path: Path, raw: dict[str, Any]) -> list[str]:
    others = sorted(raw.keys() - {"ignore"})
    if others:
        raise ValueError(
            f"{_FIELD}={path}: has {', '.join(others[:3])} besides 'ignore'; give either {{'ignore': [...]}} or a "
            "ModelSlim description"
        )
    ignore = raw["ignore"]
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise ValueError(f"{_FIELD}={path}: ignore={ignore!r}, expected a list of names and 're:' patterns")
    return ignore


def _refuse_quantized(index: CheckpointIndex) -> None:
    configs = {id(config): config for config in (index.config, index.text_config)}.values()
    given = next((c[key] for c in configs for key in ("quantization_config", "compression_config") if c.get(key)), None)
    method = given.get("quant_method", "of an unnamed method") if isinstance(given, dict) else given
    evidence = f"config.json has a quantization_config ({method})" if given is not None else ""
    for name, info in index.tensors.items():
        if evidence:
            break
        if name.endswith(_QUANTIZED_SUFFIXES) or (name.endswith(".weight") and info.dtype not in _FLOATING):
            evidence = f"{name} is {info.dtype}"
    if evidence:
        raise ValueError(
            f"{index.model_dir}: the checkpoint is already quantized: {evidence}; quantization=ascend quantizes while "
            "it sends weights and needs the BF16 checkpoint"
        )


def _leave_out(layers: Sequence[Layer], patterns: tuple[str, ...]) -> list[Layer]:
    names = {layer.name for layer in layers}
    left_out: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                regex = re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"ignore {pattern!r}: not a regular expression: {error}") from error
            found = {name for name in names if regex.fullmatch(name)}
        else:
            found = {pattern.removesuffix(".weight")} & names
        if not found:
            raise ValueError(
                f"ignore {pattern!r}: matches no layer of the checkpoint{_similar(pattern, names)}; give a module's "
                "full name, or 're:' and a regular expression for the whole name"
            )
        left_out |= found
    return [replace(la, reason=IGNORED) if la.quantized and la.name in left_out else la for la in layers]


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.removeprefix("re:"), names, n=1)
    return f" (similar: {close[0]!r})" if close else ""


def _load(path: Path, raw: dict, index: CheckpointIndex, tp_size: int, expert_parallel: bool) -> AscendDescription:
    _refuse_quantized(index)
    types = _described_types(path, raw)
    layers = read_layers(index)
    _refuse_strangers(path, types, layers, index)
    _refuse_accidents({f"{name}.weight": kind for name, kind in types.items()}, f"{path}: ")
    described = [_as_described(path, layer, types, tp_size) for layer in layers]
    return _checked(index, described, tp_size, expert_parallel)


def _described_types(path: Path, raw: dict[str, Any]) -> dict[str, str]:
    """Module name -> type, all other fields of a description checked."""
    types: dict[str, str] = {}
    for key, value in raw.items():
        if key in _METADATA:
            if value not in _METADATA[key]:
                allowed = " or ".join(repr(known) for known in sorted(_METADATA[key], key=str))
                raise ValueError(f"{path}: {key}={value!r} is not supported: MXFP8 needs {allowed}")
        elif key in _KV_FIELDS or key.endswith(_KV_ENTRIES):
            raise ValueError(f"{path}: {key}={value!r}: quantized KV caches are not supported; remove the entry")
        elif key in _INFORMATIVE:
            continue
        elif "." not in key or not isinstance(value, str):
            raise ValueError(f"{path}: unknown field {key}={value!r}; remove it")
        elif value not in (QUANTIZED, FLOAT):
            raise ValueError(f"{path}: {key} is {value!r}; only {QUANTIZED} and {FLOAT} are supported")
        else:
            module, _, tensor = key.rpartition(".")
            # Entries for a module's other tensors (bias, weight_scale) repeat what its weight says.
            if tensor == "weight":
                types[module] = value
            else:
                types.setdefault(module, value)
    if not types:
        raise ValueError(f"{path}: describes no layer; delete it to have one derived, or give a whole description")
    return types


def _refuse_strangers(path: Path, types: dict[str, str], layers: Sequence[Layer], index: CheckpointIndex) -> None:
    known = {layer.name for layer in layers} | {name.rpartition(".")[0] for name in index.tensors}
    known |= {key.removesuffix(".weight") for layer in layers for key in layer.description_keys()}
    strangers = [name for name in types if name not in known]
    if strangers:
        raise ValueError(
            f"{path}: {len(strangers)} of its {len(types)} layers are not in the checkpoint {index.model_dir} (the "
            f"first: {strangers[0]}{_similar(strangers[0], known)}): it describes another model"
        )


def _as_described(path: Path, layer: Layer, types: dict[str, str], tp_size: int) -> Layer:
    """The layer as a description has it; what the description leaves out is FLOAT if it has to be."""
    what = f"{path}: {layer.name} {list(layer.info.shape)}"
    keys = layer.description_keys()
    if not keys and layer.name not in types:
        keys = (f"{layer.experts}.0.{layer.name.rpartition('.')[2]}.weight",)
    kinds = {types[name] for name in (layer.name, *(key.removesuffix(".weight") for key in keys)) if name in types}
    if len(kinds) > 1:
        raise ValueError(f"{what}: its entries ({', '.join(keys)}) differ; make them all {QUANTIZED} or all {FLOAT}")
    if not kinds and layer.quantized:
        raise ValueError(f"{what} is not described: add {keys[0]!r} as {QUANTIZED!r} or {FLOAT!r}")
    if kinds != {QUANTIZED}:
        return replace(layer, reason=DESCRIBED) if layer.quantized else layer
    if layer.reason in NEVER:
        raise ValueError(f"{what} is {QUANTIZED}, but cannot be ({layer.reason}); make it {FLOAT}")
    if layer.reason and tp_size > 1 and layer.k % (MX_BLOCK_SIZE * tp_size):
        raise ValueError(
            f"{what} is {QUANTIZED}, but it is not known how tensor parallelism cuts it, and its {layer.k} inputs do "
            f"not divide into blocks of {MX_BLOCK_SIZE} on tensor_model_parallel_size={tp_size}; make it {FLOAT}"
        )
    return replace(layer, reason="")


def _checked(index: CheckpointIndex, layers: Sequence[Layer], tp_size: int, expert_parallel: bool) -> AscendDescription:
    if tp_size < 1:
        raise ValueError(f"tensor_model_parallel_size={tp_size}: must be 1 or more")
    _refuse_mixed(layers)
    _refuse_uncuttable(layers, tp_size, expert_parallel)
    description = AscendDescription(str(index.model_dir), tp_size, tuple(layers), frozenset(index.tensors))
    _refuse_accidents(description.to_json_dict())
    if not description.quantized_layers:
        raise ValueError(
            f"{index.model_dir}: no layer is left to quantize; leave out fewer, or set actor_rollout_ref.rollout."
            "quantization=null"
        )
    return description


def _refuse_mixed(layers: Sequence[Layer]) -> None:
    packed: dict[str, list[Layer]] = {}
    for layer in layers:
        # Without a fused first projection, `q_a_proj` is no shard of anything; lists of one are never mixed.
        if layer.packed_with and layer.reason not in NEVER:
            packed.setdefault(layer.packed_with, []).append(layer)
    for name, shards in packed.items():
        kept = [layer.name for layer in shards if not layer.quantized]
        if kept and len(kept) < len(shards):
            quantized = next(layer.name for layer in shards if layer.quantized)
            raise ValueError(
                f"{name}: the engine packs these {len(shards)} layers into one, and they must be alike: "
                f"{quantized} is quantized, {kept[0]} is not ({len(kept)} such); leave out all of them or none"
            )


def _refuse_uncuttable(layers: Sequence[Layer], tp_size: int, expert_parallel: bool) -> None:
    bad: dict[str, list[Layer]] = {}
    for layer in layers:
        cut = layer.split == ROW and not (layer.experts and expert_parallel)
        if layer.quantized and cut and tp_size > 1 and layer.k % (MX_BLOCK_SIZE * tp_size):
            bad.setdefault(_pattern(layer.name), []).append(layer)
    if not bad:
        return
    faults = []
    for pattern, alike in bad.items():
        first = alike[0]
        works = [size for size in range(1, tp_size) if size == 1 or first.k % (MX_BLOCK_SIZE * size) == 0]
        # A layer's experts are quantized together, so they are left out together.
        glob = f"{_pattern(first.experts)}.**" if first.experts else pattern
        regex = re.escape(glob).replace(r"\*\*", ".*").replace(r"\*", r"\d+")
        faults.append(
            f"{first.name} {list(first.info.shape)} ({len(alike)} such) has {first.k} inputs, {first.k / tp_size:g} "
            f"per rank: use tensor_model_parallel_size={' or '.join(map(str, works))}, or leave it out: "
            f"{json.dumps({'ignore': ['re:' + regex]})} in {_FIELD}"
        )
    raise ValueError(
        f"tensor_model_parallel_size={tp_size}: cuts the inputs of row-parallel layers where a block of "
        f"{MX_BLOCK_SIZE} does not end: {'; '.join(faults)}"
    )


def _refuse_accidents(entries: dict[str, Any], source: str = "") -> None:
    """vllm-ascend (`is_layer_skipped_ascend`) skips a layer as soon as a FLOAT entry *starts with* its name."""
    floats = sorted(key for key, kind in entries.items() if key.endswith(".weight") and kind == FLOAT)
    for name, kind in entries.items():
        if not name.endswith(".weight") or kind != QUANTIZED:
            continue
        prefix = name.removesuffix(".weight")
        position = bisect.bisect_left(floats, prefix)
        if position < len(floats) and floats[position].startswith(prefix):
            other = floats[position].removesuffix(".weight")
            raise ValueError(
                f"{source}{prefix} is quantized and {other} is not: vllm-ascend would take the second, whose name "
                "starts with the first's, for it and leave both unquantized; quantize both or neither"
            )


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _render(description: AscendDescription) -> str:
    groups: dict[tuple, list[Layer]] = {}
    for layer in description.layers:
        groups.setdefault((_pattern(layer.name), layer.info.shape, layer.reason), []).append(layer)
    rows = [("layer", "count", "shape", "dtype", "cut", "before", "after", "in the engine")]
    for (pattern, shape, reason), alike in groups.items():
        first = alike[0]
        old, new = len(alike) * first.info.nbytes, len(alike) * first.nbytes_after
        size = " x ".join(map(str, shape)) if first.info.nbytes else "tied"
        cut = first.split if first.quantized else ""
        rows.append(
            (
                pattern,
                str(len(alike)),
                size,
                first.info.dtype,
                cut,
                format_bytes(old),
                format_bytes(new),
                reason or "MXFP8",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 5, 6}
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    unknown = sum(layer.reason == UNKNOWN for layer in description.layers)
    if unknown:
        lines.append(f"Warning: {unknown} layers are of a kind that is not known here and stay unquantized.")
    lines.append(f"In MXFP8: {description.summary()}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verl describe`."""
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="local Hugging Face directory; no weight is read, config.json is enough"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the rollout (default: 1)")
    parser.add_argument("--expert-parallel", action="store_true", help="experts are dealt out whole, not cut")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="module, or re:REGEX; repeatable")
    parser.add_argument("-o", "--output", default=DESCRIPTION_FILE, help="file to write (default: ./%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print the table and write the JSON; 2 and one line on stderr where a model is refused."""
    try:
        description = build_description(
            options.model_dir,
            tp_size=options.tp,
            ignore=options.ignore,
            expert_parallel=options.expert_parallel,
            index=read_index_or_config(options.model_dir),
        )
        atomic_write_text(options.output, json.dumps(description.to_json_dict(), indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{description.table()}\nwritten: {options.output}\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`verl describe` under its module's name."""
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.utils.quantization.ascend_description",
        description="Print which layers of a checkpoint run in MXFP8 on Ascend, and write vllm-ascend's description.",
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
