"""The table of `verl describe`: layers of the same kind in one row."""

from __future__ import annotations

from verl.utils.byte_size import format_bytes
from verl.utils.quantization.ascend_description.description import AscendDescription
from verl.utils.quantization.ascend_layers import UNKNOWN, Layer, name_pattern
from verl.utils.quantization.formats import WEIGHT_FORMATS

_HEADER = ("layer", "count", "shape", "dtype", "cut", "before", "after", "in the engine")
_RIGHT_ALIGNED = {1, 5, 6}


def render_table(description: AscendDescription) -> str:
    """Render count, shape, tensor-parallel cut and bytes before and after, one row per kind of layer."""
    groups: dict[tuple[str, tuple[int, ...], str, str], list[Layer]] = {}
    for layer in description.layers:
        kind = name_pattern(layer.name), layer.info.shape, layer.reason, layer.described_as
        groups.setdefault(kind, []).append(layer)
    rows = [_HEADER, *(_row(pattern, layers) for (pattern, *_), layers in groups.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    unknown = sum(layer.reason == UNKNOWN for layer in description.layers)
    if unknown:
        lines.append(f"Warning: {unknown} layers are of an unknown kind and stay unquantized.")
    lines.append(f"In {description.weight_formats}: {description.summary()}")
    return "\n".join(lines)


def _row(pattern: str, layers: list[Layer]) -> tuple[str, ...]:
    first = layers[0]
    before, after = len(layers) * first.info.nbytes, len(layers) * first.engine_nbytes
    return (
        pattern,
        str(len(layers)),
        " x ".join(map(str, first.info.shape)) if first.info.nbytes else "tied",
        first.info.dtype,
        first.split if first.quantized else "",
        format_bytes(before),
        format_bytes(after),
        first.reason or WEIGHT_FORMATS[first.scheme],
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = enumerate(zip(row, widths, strict=True))
    return "  ".join(
        cell.rjust(width) if column in _RIGHT_ALIGNED else cell.ljust(width) for column, (cell, width) in cells
    ).rstrip()
