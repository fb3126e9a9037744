"""Assembly of a report into one self-contained file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from verl import __version__
from verl.report import layers, panels, samples, settings, stages, summary
from verl.report.curves import draw_curves
from verl.report.panels import Panel
from verl.report.run import Run, read_runs
from verl.report.style import SERIES, SERIES_DARK, Drawn, write_pngs
from verl.report.timeline import StepTimeline, draw_timeline
from verl.utils.atomic_io import atomic_write_text
from verl.utils.text import without_controls

_NOTHING = "no step is logged yet"
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Shown:
    """A figure on the page."""

    key: str
    title: str
    says: str
    drawn: Drawn
    wide: bool = False


@dataclass
class Section:
    """A heading with its figures, and the missing figures with their reasons."""

    title: str
    figures: list[Shown] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)


def write_report(directories: Sequence[str | Path], output: str | Path, pngs: str | Path | None = None) -> Path:
    """Write the report of the runs in `directories` to `output`, and each figure as PNG into `pngs` if given.

    Returns:
        the path of the report, absolute.

    Raises:
        ValueError: a directory holds no run.
        OSError: a file cannot be written.
    """
    runs = read_runs(directories)
    sections = make_sections(runs)
    output = Path(output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, render(runs, sections))
    if pngs is not None:
        write_pngs({shown.key: shown.drawn for section in sections for shown in section.figures}, Path(pngs))
    return output


def make_sections(runs: Sequence[Run]) -> list[Section]:
    """Return all figures. Data that a run lacks become a note of the run."""
    if not any(run.records for run in runs):
        return [Section("Curves", absent=[("Every curve", _NOTHING)]), _time(runs)]
    learning = _curves("Learning", (*panels.LEARNING, *panels.validation(runs)), runs)
    if not any(shown.key.startswith("validation") for shown in learning.figures):
        learning.absent.append(("Validation", "no validation yet: see data.val_files and trainer.test_freq"))
    return [
        learning,
        _curves("Responses", panels.RESPONSES, runs),
        _curves("Policy", panels.POLICY, runs),
        _curves("Rollout against trainer", panels.MISMATCH, runs),
        _quantization(runs),
        _time(runs),
    ]


def _curves(title: str, of: Sequence[Panel], runs: Sequence[Run]) -> Section:
    section = Section(title)
    for panel in of:
        drawn = draw_curves(panel, runs)
        if drawn is None:
            section.absent.append((panel.title, panel.absent or _NOTHING))
        else:
            section.figures.append(Shown(panel.key, panel.title, panel.says, drawn))
    return section


def _quantization(runs: Sequence[Run]) -> Section:
    section = Section("Quantized weights")
    title = "Largest quantization error of a weight"
    if drawn := layers.draw_layers(runs):
        says = (
            "Relative error of the worst weight in MXFP8 or fp8: norm of the error divided by the norm of the weight. "
            "About 3 % is normal for MXFP8; a rising layer has outliers."
        )
        section.figures.append(Shown("quantization_error", title, says, drawn))
    else:
        section.absent.append((title, "actor_rollout_ref.rollout.quantization is null, or the engine quantizes"))
    if drawn := layers.draw_depths(runs):
        says = (
            "The same error for every layer, after the last update. Layers of one kind have similar errors; a layer "
            "with a larger one has outliers and may be left out (rollout.quantization_config_file)."
        )
        if len(runs) > 1:
            says = f"The worst weight of each layer. {says}"
        section.figures.append(Shown("quantization_by_layer", "Quantization error by layer", says, drawn))
    return section


def _time(runs: Sequence[Run]) -> Section:
    section = _curves("Time and memory", panels.SPEED, runs)
    if drawn := stages.draw_stages(runs):
        says = "Generation may overlap other stages (trainer.rollout_lag=1), so the parts may exceed the step."
        section.figures.insert(0, Shown("stages", "Seconds of a step by stage", says, drawn))
    else:
        section.absent.append(("Seconds of a step by stage", _NOTHING))
    for number, run in enumerate(runs):
        title = "Timeline of a step" if len(runs) == 1 else f"Timeline of a step, {run.name}"
        if run.timeline is None:
            section.absent.append((title, "see the notes above"))
            continue
        try:
            timeline = draw_timeline(run.timeline, title)
        except (ValueError, OSError) as error:
            section.absent.append((title, str(error)))
            continue
        key = f"timeline_{number}" if number else "timeline"
        section.figures.append(Shown(key, f"{title}: step {timeline.step}", _says(timeline), timeline.drawn, wide=True))
    return section


def _says(timeline: StepTimeline) -> str:
    text = (
        f"{timeline.seconds:.3g} s: an engine computed in {timeline.engine:.0%} of them, a trainer rank in "
        f"{timeline.train:.0%}, no process in {timeline.overhead:.0%}."
    )
    if timeline.left_out:
        text += f" {timeline.left_out} further processes of these kinds are not shown."
    return text


def render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """Render the page. Every text from a run is escaped, and its control characters become symbols."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Samples first, because they add notes about missing files.
    of_runs = [_run_context(run) for run in runs]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=of_runs,
        facts=summary.facts(runs),
        sections=sections,
        settings=settings.rows(runs),
        colors=list(zip(SERIES, SERIES_DARK, strict=True)),
        made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        version=__version__,
    )
    return without_controls(page)


def _run_context(run: Run) -> dict[str, Any]:
    return {
        "samples": samples.read_samples(run),
        "name": run.name,
        "directory": str(run.directory),
        "state": summary.state(run),
        "about": summary.about(run),
        "layers": layers.worst_layers(run),
        "config": settings.whole(run) if run.config else "",
        "notes": run.notes,
    }
