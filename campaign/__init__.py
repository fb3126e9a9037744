"""Campaigns: many small experiments with one rule, repeatable by a seed.

`python -m campaign input` gives verl bad input; docs/reliability.md has its rule and its last result.

- cases.py: a case, its command and what its error must name
- config_keys.py, files.py: the cases; damage.py: damaged files; legality.py: legal values of a key
- sandbox.py: the directory in which a case runs; child.py: the process; verdict.py: the rule
- jsonl.py: files of results; results.py: the results of cases and their table

`python -m campaign.faults` strikes real runs, and `python -m campaign.soak` looks for growth in a long one.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Fixtures of the tests, and the tables of the benchmarks, whose modules import each other from their own folder.
sys.path += [folder for folder in map(str, (ROOT / "tests", ROOT / "benchmarks")) if folder not in sys.path]
