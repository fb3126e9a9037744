"""Style of figures: colors that the page can switch to dark mode, text as text, output as SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, SOFT, GRID = "#1f2430", "#667085", "#e4e7ec"
# Contrast of at least 4.5 : 1 against the page in light and dark mode; distinguishable without seeing red or green.
SERIES = ("#1f6fd6", "#c2500a", "#0f7f5f", "#9a3fb5", "#c0255f", "#0b7d96", "#7d6608", "#59636f")
SERIES_DARK = ("#6aa9ff", "#ff9d5c", "#4fd1a5", "#d191ea", "#ff86ae", "#5cc9e0", "#d9bd45", "#aab4c2")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
_VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", **{c: f"--c{i}" for i, c in enumerate(SERIES)}}

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "svg.fonttype": "none",
    # A name from a run may contain dollar signs.
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


class Drawn:
    """A finished figure.

    Args:
        made: the figure.
        title: what it shows.

    Attributes:
        svg: to stand in a page, whose style gives the colors.
    """

    def __init__(self, made: Figure, title: str):
        self._made, self._title = made, title
        self.svg = _svg(made)

    def png(self) -> bytes:
        """Return the figure as PNG, on white, with its title."""
        out = io.BytesIO()
        with matplotlib.rc_context(RC):
            self._made.suptitle(self._title, fontsize=10, color=INK, x=0.02, ha="left")
            self._made.savefig(out, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return out.getvalue()


@contextmanager
def figure(title: str, width: float = 5.6, height: float = 2.9) -> Iterator[tuple[Figure, list[Drawn]]]:
    """Provide a figure to draw into, in inches at 72 points. At the end of the block the list holds the result."""
    drawn: list[Drawn] = []
    with matplotlib.rc_context(RC):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made, drawn
        drawn.append(Drawn(made, title))


def _svg(made: Figure) -> str:
    # Equal figures contain equal names, so that two reports can be compared.
    with matplotlib.rc_context({"svg.hashsalt": "verl"}):
        out = io.StringIO()
        made.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    head, close, body = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return head + close + re.sub(r'style="[^"]*"', lambda style: _of_page(style[0]), body)


def _of_page(style: str) -> str:
    """Replace colors and font by the page's."""
    style = style.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    return re.sub(r"#[0-9a-f]{6}", lambda c: f"var({_VARIABLES[c[0]]})" if c[0] in _VARIABLES else c[0], style)


def number(value: float, _position: object = None) -> str:
    """Return a short number: `0.0007`, `3,449`, `1e-06`."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"


def percent(value: float, _position: object = None) -> str:
    """Return a share as `12 %`, `0.3 %`."""
    return f"{number(round(100 * value, 6))} %"


def step_axis(axes: Axes, first: float, last: float) -> None:
    """Label the x axis with training steps, as integers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(number))
    axes.set_xlabel("training step")
    margin = max((last - first) * 0.02, 0.5)
    axes.set_xlim(first - margin, last + margin)


def value_axis(axes: Axes, unit: str, *, log: bool = False, share: bool = False) -> None:
    """Label the y axis with the unit."""
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # With powers of ten alone a short axis would have at most one tick.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=2, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(percent if share else number))
    axes.set_ylabel(unit)


def short(text: str, length: int) -> str:
    """Return text with an ellipsis in the middle if it is too long."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[-half:]}"


def legend(axes: Axes, entries: Sequence[tuple[Artist, str]], columns_of: int = 66) -> None:
    """Place the legend above the axes, in as many columns as fit a line of `columns_of` characters."""
    names = [name for _, name in entries]
    widest = max(len(name) for name in names) + 6
    columns = max(1, min(len(names), columns_of // widest))
    # Lines beyond the second must not reduce the height of the curves.
    extra = max(0, -(-len(names) // columns) - 2)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_figheight(figure.get_figheight() + 0.18 * extra)
    axes.legend(
        [handle for handle, _ in entries],
        names,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        borderaxespad=0.2,
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.4,
    )


def write_pngs(figures: dict[str, Drawn], directory: Path) -> list[Path]:
    """Write DIRECTORY/NAME.png for each figure."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawn in figures.items():
        path = directory / f"{name}.png"
        path.write_bytes(drawn.png())
        paths.append(path)
    return paths
