"""Print the import graph of `verl`: size of the packages, circles, and upward imports.

Usage: python scripts/import_graph.py [--check]

The import contract in pyproject.toml defines the layers. With `--check` the exit status is 1 if there is a circle, more
than one upward edge, or a package with at least a quarter of all lines.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "verl"
LARGEST_SHARE = 0.25
UPWARD_EDGES = 1


def modules() -> dict[str, Path]:
    """Return the file of every module of `verl`, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of `verl` that a module imports, also under TYPE_CHECKING and in functions.

    `from package import name` counts as an import of the submodule `name` if it exists, otherwise of the package.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return {module for module in found if module in known and module != name}


def module_graph() -> dict[str, set[str]]:
    """Return, by module, the modules that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def folder_of(module: str, known: dict[str, Path]) -> str:
    """Return the package that contains a module; a package contains itself."""
    return module if known[module].name == "__init__.py" else module.rpartition(".")[0]


def folder_graph(graph: dict[str, set[str]], depth: int | None = None) -> dict[str, set[str]]:
    """Return the import graph of the folders; `depth` limits the number of parts in their names.

    An import of a package's `__init__.py` is an edge to the folder of the package.
    """
    known = modules()

    def folder(module: str) -> str:
        name = folder_of(module, known)
        return ".".join(name.split(".")[:depth]) if depth else name

    edges: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        for target in targets:
            a, b = folder(module), folder(target)
            # Imports between a package and its subpackages do not count.
            if a != b and not a.startswith(f"{b}.") and not b.startswith(f"{a}."):
                edges[a].add(b)
    return dict(edges)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one node, sorted (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def layers() -> list[list[str]]:
    """Return the layers of the import contract, highest first; each is a list of packages."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in tool["contracts"] if c["type"] == "layers")
    return [[part.strip() for part in layer.replace(":", "|").split("|")] for layer in contract["layers"]]


def upward_edges(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from a lower layer into a higher one, as `module -> module`."""
    height = {package: -level for level, row in enumerate(layers()) for package in row}

    def layer(module: str) -> int | None:
        while module:
            if module in height:
                return height[module]
            module = module.rpartition(".")[0]
        return None

    found = []
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            low, high = layer(module), layer(target)
            if low is not None and high is not None and low < high:
                found.append(f"{module} -> {target}")
    return found


def lines_by_package() -> dict[str, int]:
    """Return the lines of Python code, by top-level package of `verl`."""
    counted: dict[str, int] = defaultdict(int)
    for name, path in modules().items():
        counted[".".join(name.split(".")[:2])] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(counted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a limit is exceeded")
    options = parser.parse_args()
    graph = module_graph()
    counted = lines_by_package()
    total = sum(counted.values())
    for name, lines in sorted(counted.items(), key=lambda item: -item[1]):
        print(f"{name:<28}{lines:>7} lines {lines / total:6.1%}")
    between_modules, between_folders = circles(graph), circles(folder_graph(graph))
    between_packages, upward = circles(folder_graph(graph, depth=2)), upward_edges(graph)
    for title, found in (
        ("circles between modules", between_modules),
        ("circles between folders", between_folders),
        ("circles between top-level packages", between_packages),
    ):
        print(f"{title}: {len(found)}")
        for circle in found:
            print("   " + " <-> ".join(circle))
    print(f"upward edges: {len(upward)}")
    for edge in upward:
        print(f"   {edge}")
    share = max(counted.values()) / total
    print(f"{len(graph)} modules, {total} lines; the largest package has {share:.1%}")
    failed = between_modules or between_folders or between_packages or len(upward) > UPWARD_EDGES
    return int(options.check and bool(failed or share >= LARGEST_SHARE))


if __name__ == "__main__":
    raise SystemExit(main())
