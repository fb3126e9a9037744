"""Benchmarks are scripts that import each other from their own folder, so the tests add it to the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
