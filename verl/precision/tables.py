"""The tables of `verl describe --budget`."""

from __future__ import annotations

from collections.abc import Sequence

from verl.precision.budget import Search
from verl.precision.plans import Plan
from verl.precision.speed import Speed
from verl.utils.byte_size import format_bytes
from verl.utils.quantization.ascend_description.units import PrecisionUnits
from verl.utils.quantization.formats import WEIGHT_FORMATS


def render_costs(units: PrecisionUnits, found: Search) -> str:
    """Render, for each scheme, the KL divergence of each unit: a row per decoder layer, a column per kind.

    The units of the chosen plan are marked by a star.
    """
    chosen = found.chosen.plan.schemes
    by_name = {unit.name: unit for unit in units.units}
    kinds = list(dict.fromkeys(unit.kind for unit in units.units))
    depths = sorted({unit.depth for unit in units.units}, key=lambda depth: -1 if depth is None else depth)
    blocks = []
    for scheme in dict.fromkeys(option.scheme for option in found.options):
        cells: dict[tuple[int | None, str], str] = {}
        sums = dict.fromkeys(kinds, 0.0)
        for option in found.options:
            if option.scheme == scheme:
                unit = by_name[option.unit]
                mark = "*" if chosen.get(option.unit) == scheme else " "
                cells[unit.depth, unit.kind] = f"{option.cost:.1e}{mark}"
                sums[unit.kind] += option.cost
        rows = [["layer", *(f"{_label(kind)} " for kind in kinds)]]
        rows += [
            ["-" if depth is None else str(depth), *(cells.get((depth, k), "") for k in kinds)] for depth in depths
        ]
        rows.append(["sum", *(f"{sums[kind]:.1e} " for kind in kinds)])
        title = (
            f"KL divergence in nats per token if only these layers are in {WEIGHT_FORMATS[scheme]} (* chosen; sum: of "
            "all layers):"
        )
        blocks.append(f"{title}\n{_aligned(rows)}")
    return "\n\n".join(blocks)


def render_curve(units: PrecisionUnits, found: Search, speed: Speed) -> str:
    """Render the measured plans: bytes, tokens per second and KL divergences."""
    rows = [["quantized", "weights", "read per token", "tokens/s", "KL predicted", "KL measured", ""]]
    rows.append([f"0 of {len(units.units)}", *_sizes(units, Plan(), speed), "0", "0", ""])
    for one in found.measured:
        number = len(one.plan.options)
        rows.append(
            [
                f"{number} of {len(units.units)}",
                *_sizes(units, one.plan, speed),
                f"{one.predicted:.3g}",
                f"{one.measured:.3g}",
                "<- chosen" if one is found.chosen else "",
            ]
        )
    title = "Measured choices (groups of layers; tokens per second of one sequence, limited by reading weights):"
    return f"{title}\n{_aligned(rows)}"


def _sizes(units: PrecisionUnits, plan: Plan, speed: Speed) -> list[str]:
    read, rate = speed.bytes_per_token(plan), speed.tokens_per_second(plan)
    return [format_bytes(units.unquantized_nbytes - plan.saved), format_bytes(read), f"{rate:,.4g}"]


def _label(kind: str) -> str:
    """Return a short name of a kind: `self_attn.q,k,v` for `model.layers.*.self_attn.{q_proj,k_proj,v_proj}`."""
    return kind.rpartition("*.")[2].replace("_proj", "").replace("{", "").replace("}", "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
