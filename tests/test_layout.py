"""The layout of the repository: layers, circles, mirrored tests, public import paths."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("import_graph", ROOT / "scripts/import_graph.py")
import_graph = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(import_graph)


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


def public_names():
    page = (ROOT / "docs/architecture.md").read_text()
    table = page.partition("<!-- public-paths -->")[2].partition("<!-- /public-paths -->")[0]
    for line in table.splitlines()[3:]:
        module, names = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("| ").split("|"))
        yield from ((module[0], name) for name in names)


@pytest.mark.parametrize(("module", "name"), public_names(), ids=str)
def test_a_public_name_keeps_its_path(module, name):
    assert pkgutil.resolve_name(f"{module}.{name}") is not None


def test_the_table_of_public_names_is_read():
    assert ("verl.protocol", "DataProto") in set(public_names())
