"""`verl describe --budget`: measure, choose, print, and write the description."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging

from verl.precision.budget import Search, measure_options, search
from verl.precision.calibration import data_prompts, shipped_prompts
from verl.precision.plans import Plan
from verl.precision.sensitivity import Sensitivity, load_model
from verl.precision.speed import Speed
from verl.precision.tables import render_costs, render_curve
from verl.utils.atomic_io import atomic_write_text
from verl.utils.byte_size import GB
from verl.utils.devices import detect_device, torch_device
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description.table import render_table
from verl.utils.quantization.ascend_description.units import PrecisionUnits, read_units
from verl.utils.quantization.formats import ASCEND_SCHEMES, W4A8_MXFP
from verl.utils.tokenizer import hf_tokenizer

_BUDGETS = ("kl",)


@dataclass(frozen=True)
class BudgetOptions:
    """The options of `verl describe --budget`; see its help."""

    model_dir: str
    output: str
    budget: str
    scheme: str
    tp: int
    expert_parallel: bool
    ignore: Sequence[str]
    data: Sequence[str]
    prompt_key: str
    tokens: int
    device: str
    bandwidth: float
    picture: str | None


def run(options: BudgetOptions) -> str:
    """Write the description and the picture; return the text to print.

    Raises:
        ValueError, NotImplementedError, OSError: an option, a file or a model that cannot work, and what to do.
    """
    budget = parse_budget(options.budget)
    _check_options(options)
    started = time.perf_counter()
    index = read_checkpoint_index(options.model_dir)
    # W4A8_MXFP is coarse: a layer that cannot bear it may still bear MXFP8.
    schemes = ASCEND_SCHEMES[::-1] if options.scheme == W4A8_MXFP else (options.scheme,)
    units = read_units(
        index, schemes, tp_size=options.tp, ignore=options.ignore, expert_parallel=options.expert_parallel
    )
    prompts = _prompts(options)
    transformers_logging.disable_progress_bar()
    model = load_model(options.model_dir, torch_device(_device(options.device)))
    sensitivity = Sensitivity(model, options.model_dir, units, prompts)
    found = search(measure_options(units, sensitivity.kl, _show_progress), sensitivity.kl, budget)
    speed = Speed(units, options.bandwidth * GB * options.tp)
    description = units.describe(found.chosen.plan.schemes)
    atomic_write_text(options.output, json.dumps(description.to_json_dict(), indent=2) + "\n")
    if options.picture is not None:
        _write_picture(options, units, found, speed, budget)
    chosen = found.chosen
    lines = [
        render_costs(units, found),
        render_curve(units, found, speed),
        render_table(description),
        *(f"not measured, stays unquantized: {name}: {reason}" for name, reason in units.unfit.items()),
        f"{sensitivity.tokens} tokens of {len(prompts)} prompts, {time.perf_counter() - started:.0f} s"
        + ("" if sensitivity.reuses_layers else "; every measurement ran all layers of this model"),
        f"KL divergence of the chosen plan: {chosen.measured:.3g} nats per token measured, {chosen.predicted:.3g} "
        f"predicted (sum of single layers {chosen.plan.cost:.3g}), budget {budget:g}",
        f"written: {options.output}; use it as actor_rollout_ref.rollout.quantization_config_file",
    ]
    if options.picture is not None:
        lines.append(f"written: {options.picture}")
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:])


def parse_budget(text: str) -> float:
    """Return the number of `kl=NUMBER`.

    Raises:
        ValueError: another name, or no positive number.
    """
    name, _, value = text.partition("=")
    if name not in _BUDGETS:
        raise ValueError(f"--budget {text}: unknown budget {name!r}; must be kl=NUMBER, for example kl=0.01")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"--budget {text}: must be a positive number, the largest allowed KL divergence in nats per token, for "
            "example kl=0.01"
        )
    return number


def _check_options(options: BudgetOptions) -> None:
    """Check what would otherwise fail after minutes of measuring."""
    if options.tokens < 1:
        raise ValueError(f"--tokens {options.tokens}: must be 1 or more")
    if not 0 < options.bandwidth < math.inf:
        raise ValueError(f"--bandwidth {options.bandwidth:g}: must be a positive number of GB/s, for example 1600")
    if options.picture is not None and Path(options.picture).suffix != ".png":
        raise ValueError(f"--picture {options.picture}: only PNG is supported; choose a name that ends in .png")
    for option, name in (("--output", options.output), ("--picture", options.picture)):
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise ValueError(f"{option} {name}: its directory does not exist; create it first")


def _prompts(options: BudgetOptions) -> list[list[int]]:
    tokenizer = hf_tokenizer(options.model_dir)
    if not options.data:
        return shipped_prompts(tokenizer, options.tokens)
    try:
        return data_prompts(options.data, tokenizer, options.tokens, options.prompt_key)
    except (ValueError, NotImplementedError, OSError) as error:
        # These errors name the config keys of a run.
        text = str(error).replace("data.prompt_key", "--prompt-key")
        raise ValueError(f"--data: {text}; without --data, short texts of the package are used") from error


def _device(name: str) -> str:
    try:
        return detect_device(name)
    except ValueError as error:
        raise ValueError(f"--device {name}: {error}") from error


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rmeasured {done} of {of}" + ("\n" if done == of else ""))
        sys.stderr.flush()


def _write_picture(options: BudgetOptions, units: PrecisionUnits, found: Search, speed: Speed, budget: float) -> None:
    from verl.report.precision import Point, draw_precision

    assert options.picture is not None

    def points(plans: Iterable[tuple[Plan, float]]) -> list[Point]:
        return [
            Point(units.unquantized_nbytes - plan.saved, speed.tokens_per_second(plan), kl)
            for plan, kl in plans
            if kl > 0
        ]

    drawn = draw_precision(
        points((plan, found.predict(plan)) for plan in found.plans),
        points((one.plan, one.measured) for one in found.measured),
        points([(found.chosen.plan, found.chosen.measured)]),
        budget,
    )
    Path(options.picture).write_bytes(drawn.png())
