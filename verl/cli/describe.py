"""`verl describe`: show which layers of a model run in MXFP8 or MXFP4 on Ascend, or choose them by measurement."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from verl.utils.quantization.ascend_description import command

# Bytes per second that one Ascend 950PR reads from its memory, in GB/s: the vendor's figure.
_BANDWIDTH = 1600.0
_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the table, and those of the measurement."""
    command.add_arguments(parser)
    group = parser.add_argument_group(
        "choice by measurement",
        "Measures how much each layer changes the model's next-token distribution if it is quantized, and quantizes "
        "those that cost the least. Reads the weights; needs torch and memory for the model in float32. With --scheme "
        "W4A8_MXFP each layer gets MXFP4, MXFP8 or neither.",
    )
    group.add_argument(
        "--budget", metavar="kl=NUMBER", help="largest KL divergence from the unquantized model, in nats per token"
    )
    group.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="prompts to measure with, .parquet, .json or .jsonl as for training; repeatable; default: a few short "
        "texts of the package",
    )
    group.add_argument("--prompt-key", metavar="COLUMN", help="column of the messages (default: prompt)")
    group.add_argument(
        "--tokens", type=int, metavar="N", help=f"tokens to measure, from the first prompts (default: {_TOKENS})"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), help="device to measure on (default: auto)")
    group.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help=f"memory bandwidth of a device of the engine, for tokens per second (default: {_BANDWIDTH:g}, the "
        "Ascend 950PR)",
    )
    group.add_argument("--picture", metavar="FILE.png", help="draw KL divergence against bytes and tokens per second")


def run(options: argparse.Namespace) -> int:
    """Write the description; return 2, with one line on stderr, for options or a model that cannot work."""
    names = ("data", "prompt_key", "tokens", "device", "bandwidth", "picture")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.budget is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            sys.stderr.write(f"--{option} has no effect without --budget; add --budget kl=NUMBER, or remove it\n")
            return 2
        return command.run(options)
    from verl.precision.command import BudgetOptions
    from verl.precision.command import run as run_budget

    defaults = {"data": [], "prompt_key": "prompt", "tokens": _TOKENS, "device": "auto", "bandwidth": _BANDWIDTH}
    fields = ("model_dir", "output", "budget", "scheme", "tp", "expert_parallel", "ignore", "picture")
    settings: dict[str, Any] = {**defaults, **{name: getattr(options, name) for name in fields}, **given}
    try:
        text = run_budget(BudgetOptions(**settings))
    except (ValueError, NotImplementedError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{text}\n")
    return 0
