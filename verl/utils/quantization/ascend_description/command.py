"""Command line: print the table of a model's layers and write vllm-ascend's description of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from verl.utils.atomic_io import atomic_write_text
from verl.utils.model_dir.shapes_from_config import read_index_or_config
from verl.utils.quantization.ascend_description.build import build_description
from verl.utils.quantization.ascend_description.description import DESCRIPTION_FILE
from verl.utils.quantization.ascend_description.table import render_table
from verl.utils.quantization.formats import ASCEND_SCHEMES, W8A8_MXFP8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verl describe`."""
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        help="local Hugging Face directory; config.json is enough, weights are not read",
    )
    parser.add_argument(
        "--scheme",
        choices=ASCEND_SCHEMES,
        default=W8A8_MXFP8,
        help="format of the quantized layers (default: %(default)s); the file may be edited layer by layer",
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the rollout (default: 1)")
    parser.add_argument(
        "--expert-parallel", action="store_true", help="each rank holds whole experts instead of a slice of each"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="module to leave out, or re:REGEX; repeatable"
    )
    parser.add_argument("-o", "--output", default=DESCRIPTION_FILE, help="file to write (default: ./%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print the table and write the JSON; return 2, with one line on stderr, for a model that is not supported."""
    try:
        description = build_description(
            options.model_dir,
            tp_size=options.tp,
            scheme=options.scheme,
            ignore=options.ignore,
            expert_parallel=options.expert_parallel,
            index=read_index_or_config(options.model_dir),
        )
        atomic_write_text(options.output, json.dumps(description.to_json_dict(), indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{render_table(description)}\nwritten: {options.output}\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `verl describe` under the name of this package."""
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.utils.quantization.ascend_description",
        description="Print which layers of a checkpoint run in MXFP8 or MXFP4, and write vllm-ascend's description.",
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments))
