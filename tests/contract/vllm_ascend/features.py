"""Features of the quantized rollout and the outcome of their tests, by vllm-ascend release.

A test belongs to a feature by `pytest.mark.feature(KEY)`. `conftest.py` records the outcomes of a run, and
`feature_table.py` writes them into docs/ascend_compatibility.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[3] / "build" / "contract"
# Rows of the table, in its order.
FEATURES = {
    "description": "Reads the description of the layers that verl derives",
    "platform": "Starts with verl's settings on its own platform",
    "server": "Has every engine argument, method and route that verl's server uses",
    "updates": "Repeated full updates, dense and MoE: exact bytes, stable addresses",
    "deltas": "Delta updates: the bytes of full ones",
    "refused": "A refused update is named; the next one succeeds",
    "left_out": "Layers left out, unquantized experts included",
    "groups": "Linear layers with an odd number of groups or a partial one",
    "ranks": "Tensor parallelism 2: qkv, column, row, experts",
    "shares": "Row-parallel shares that begin or end inside a group",
    "sleep": "Sleep level 1, waking by tags, between updates",
    "products": "Outputs equal those of a fake-quantized model",
    "emulation": "Holds the same bytes as the emulation on a CPU",
    "nz": "Weights in NZ format: switched off, and refused if they occur",
    "mega_moe": "Experts that MegaMoE disposed of are refused",
    "transfer": "Weight transfer of the release (hccl, npu_ipc) with verl's patch, and verl's backend for it",
    "mxfp4": "Weights in MXFP4 (W4A8_MXFP): updates, deltas, mixed schemes, tensor parallelism 2, products",
    "self_test": "Self-test at the start: passes, changes nothing, finds faults",
}


class Outcomes:
    """Counts of passed and failed tests and reasons of skipped ones, by release and feature."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, dict]] = {}

    def add(self, release: str, feature: str, outcome: str, reason: str = "") -> None:
        """Count a test.

        Args:
            outcome: `passed`, `failed` or `skipped`.
            reason: why it was skipped.

        Raises:
            ValueError: an unknown feature.
        """
        if feature not in FEATURES:
            raise ValueError(f"feature {feature!r}: must be one of {', '.join(FEATURES)}")
        counts = self.of(release, feature)
        if outcome == "skipped":
            counts["skipped"].append(reason)
        else:
            counts[outcome] += 1

    def of(self, release: str, feature: str) -> dict:
        """Return the counts `passed` and `failed`, and the reasons `skipped`."""
        empty = {"passed": 0, "failed": 0, "skipped": []}
        return self._found.setdefault(release, {}).setdefault(feature, empty)

    def write(self, part: str, directory: Path = RESULTS) -> None:
        """Write a file for each release: `RELEASE-PART.json`."""
        for release, features in self._found.items():
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{release}-{part}.json").write_text(json.dumps(features, indent=2) + "\n")

    @classmethod
    def read(cls, releases: Iterable[str], directory: Path = RESULTS) -> Outcomes:
        """Read all parts of these releases, and add them up."""
        outcomes = cls()
        for release in releases:
            for path in sorted(directory.glob(f"{release}-*.json")):
                for feature, counts in json.loads(path.read_text()).items():
                    total = outcomes.of(release, feature)
                    for key in total:
                        total[key] += counts[key]
        return outcomes
