"""`verl report`: write one HTML file about one or more runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the runs and the output files to the parser."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="trainer.default_local_dir of a run; the curves of several runs share their figures",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the HTML file; default: report.html in the first RUN_DIR"
    )
    parser.add_argument("--png", metavar="DIR", help="also write each figure as PNG into this directory")


def run(options: argparse.Namespace) -> int:
    """Write the report and print its path; return 1 if a directory holds no run or a file cannot be written."""
    from verl.report.page import write_report

    output = options.output or Path(options.runs[0]) / "report.html"
    try:
        written = write_report(options.runs, output, options.png)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"verl report: {error}\n")
        return 1
    sys.stdout.write(f"{written}\n")
    return 0
