"""The layout of the repository: layers, circles, mirrored tests, public import paths."""

import importlib.util
import pkgutil
import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("import_graph", ROOT / "scripts/import_graph.py")
import_graph = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(import_graph)

# Subjects of the test files and folders that mirror no module; paths below tests/.
OTHER_SUBJECTS = {
    "agent_loop/test_docs.py": "docs/agent_loops.md",
    "algorithms/advantages/test_every_estimator.py": "properties of all estimators",
    "algorithms/losses/test_adding_a_loss.py": "docs/extending.md",
    "algorithms/losses/test_every_loss.py": "properties of all losses",
    "campaign/test_main.py": "campaign/__main__.py",
    "contract": "releases of vllm-ascend",
    "e2e": "complete runs",
    "examples": "examples/, which has scripts in several languages",
    "npu": "an Ascend 950",
    "preflight/test_accepted_scripts.py": "scripts/upstream_scripts.py, with scripts of upstream verl",
    "preflight/test_upstream_scripts.py": "docs/migrating.md, with scripts of upstream verl",
    "report/test_browser.py": "a complete report in a browser",
    "report/test_damaged.py": "the whole report, of damaged and hostile files",
    "report/test_figures.py": "the modules that draw figures, through the text in their SVG",
    "test_check_run.py": ".github/check_run.py",
    "test_docs.py": "README.md and docs/",
    "test_fixtures.py": "tests/fixtures/",
    "test_layout.py": "the repository",
    "test_packaging.py": "the wheel",
    "test_public_imports.py": "imports of upstream verl that user code has",
    "test_workflows.py": ".github/workflows/",
    "workers/engine/test_sequence_parallel.py": "training by ranks that share sequences",
    "workers/rollout/quantization/test_adding_a_scheme.py": "docs/extending.md",
}


@pytest.fixture(scope="module")
def graph():
    return import_graph.module_graph()


def test_modules_and_folders_have_no_import_circle(graph):
    assert import_graph.circles(graph) == []
    assert import_graph.circles(import_graph.folder_graph(graph)) == []
    assert import_graph.circles(import_graph.folder_graph(graph, depth=2)) == []


def test_imports_follow_the_layers(graph):
    assert len(import_graph.upward_edges(graph)) <= import_graph.UPWARD_EDGES


def test_no_package_dominates():
    counted = import_graph.lines_by_package()
    assert max(counted.values()) < import_graph.LARGEST_SHARE * sum(counted.values()), counted


def test_a_circle_and_an_upward_import_are_found():
    circle = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert import_graph.circles(circle) == [["a", "b", "c"]]
    upward = {"verl.utils.x": {"verl.trainer.y"}, "verl.trainer.y": {"verl.utils.x"}}
    assert import_graph.upward_edges(upward) == ["verl.utils.x -> verl.trainer.y"]


def test_imports_in_functions_and_for_types_count(tmp_path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import verl.b\ndef f():\n    from verl import c\n"
    (tmp_path / "a.py").write_text(text)
    known = dict.fromkeys(("verl", "verl.a", "verl.b", "verl.c"), tmp_path)
    assert import_graph.imports("verl.a", tmp_path / "a.py", known) == {"verl.b", "verl.c"}


def test_the_contract_lists_every_package():
    listed = {package for layer in import_graph.layers() for package in layer}
    assert {package for package in import_graph.lines_by_package() if package != "verl"} == listed


def test_the_contract_ignores_no_import():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text()


def mirrors_a_module(test):
    """True if tests/a/test_b.py has verl/a/b.py or the package verl/a/b/; two folders mirror others than verl/."""
    folder = ROOT if test.parts[0] in ("benchmarks", "campaign") else ROOT / "verl"
    module = folder / test.parent / test.stem.removeprefix("test_")
    return module.with_suffix(".py").is_file() or any(module.glob("*.py"))


def without_a_subject(tests):
    """The tests, paths below tests/, that mirror no module and are not in `OTHER_SUBJECTS`."""
    return [
        str(test)
        for test in tests
        if not mirrors_a_module(test) and OTHER_SUBJECTS.keys().isdisjoint(map(str, (test, *test.parents)))
    ]


def test_every_test_file_is_named_after_its_module():
    tests = sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py"))
    assert without_a_subject(tests) == [], "name it after the module that it tests, or add it to OTHER_SUBJECTS"
    others = [test for test in tests if not mirrors_a_module(test)]
    needed = {name for name in OTHER_SUBJECTS if any(test.is_relative_to(name) for test in others)}
    assert needed == OTHER_SUBJECTS.keys(), "remove the other names from OTHER_SUBJECTS"


def test_a_misnamed_test_file_is_found():
    good = ["protocol/test_data_proto.py", "utils/test_reward_score.py", "benchmarks/test_fit.py", "e2e/test_x.py"]
    bad = ["test_fit.py", "protocol/test_data_protocol.py", "workers/test_data_proto.py", "benchmarks/test_x.py"]
    assert without_a_subject(map(PurePosixPath, good + bad)) == bad


def public_names():
    page = (ROOT / "docs/architecture.md").read_text()
    table = page.partition("<!-- public-paths -->")[2].partition("<!-- /public-paths -->")[0]
    for line in table.splitlines()[3:]:
        module, names = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("| ").split("|"))
        yield from ((one, name) for one in module for name in names)


@pytest.mark.parametrize(("module", "name"), public_names(), ids=str)
def test_a_public_name_keeps_its_path(module, name):
    assert pkgutil.resolve_name(f"{module}.{name}") is not None


def test_the_table_of_public_names_is_read():
    assert ("verl.protocol", "DataProto") in set(public_names())
