"""The package `campaign` is beside the tests, so that the repository's folder must be on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
