"""The compatibility table of the documentation: its rows and columns are those of the tests, its cells the outcomes."""

import ast
import json
from pathlib import Path

import pytest
from contract.vllm_ascend.build_env import RELEASES
from contract.vllm_ascend.feature_table import DOCUMENT, SECTION, table
from contract.vllm_ascend.features import FEATURES, Outcomes


def declared(path):
    """Return the features that the markers in a test file name."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "attr", "") == "feature"}


def test_every_feature_has_a_test_and_every_marker_a_feature():
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    assert set().union(*map(declared, files)) == set(FEATURES)


def test_table_has_the_releases_and_features_of_the_tests():
    section = DOCUMENT.read_text().split(f"<!-- {SECTION} -->\n")[1].split(f"<!-- /{SECTION} -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", *RELEASES]
    assert [row[0] for row in rows[2:]] == list(FEATURES.values())


def outcomes_of(*releases):
    outcomes = Outcomes()
    for release in releases:
        for feature in FEATURES:
            outcomes.add(release, feature, "passed")
    return outcomes


def test_cells_come_from_the_outcomes():
    outcomes = outcomes_of("1.0", "2.0")
    outcomes.add("2.0", "updates", "passed")
    outcomes.add("2.0", "updates", "skipped", "too wide")
    outcomes.add("1.0", "deltas", "skipped", "too old")
    outcomes.of("1.0", "deltas")["passed"] = 0
    lines = table(outcomes, ["1.0", "2.0"]).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines if "|" in line
    }
    assert cells[FEATURES["updates"]] == ["yes, 1", "yes, 2 (a)"]
    assert cells[FEATURES["deltas"]] == ["- (b)", "yes, 1"]
    assert lines[-2:] == ["- (a) too wide", "- (b) too old"]


def test_failed_and_missing_tests_make_no_table():
    outcomes = outcomes_of("1.0")
    with pytest.raises(ValueError, match=r"2\.0, 'Reads the description .*': no test ran; run `make contract`"):
        table(outcomes, ["1.0", "2.0"])
    outcomes.add("1.0", "sleep", "failed")
    with pytest.raises(ValueError, match=r"1\.0, 'Sleep level 1.*': 1 tests failed"):
        table(outcomes, ["1.0"])


def test_parts_of_a_run_are_added_up(tmp_path):
    outcomes_of("1.0", "2.0").write("inside", tmp_path)
    outside = Outcomes()
    outside.add("1.0", "sleep", "skipped", "reason")
    outside.write("outside", tmp_path)
    read = Outcomes.read(["1.0"], tmp_path)
    assert read.of("1.0", "sleep") == {"passed": 1, "failed": 0, "skipped": ["reason"]}
    assert read.of("1.0", "nz") == json.loads((tmp_path / "2.0-inside.json").read_text())["nz"]


def test_unknown_feature_is_an_error():
    with pytest.raises(ValueError, match="feature 'slep': must be one of description, platform"):
        Outcomes().add("1.0", "slep", "passed")
