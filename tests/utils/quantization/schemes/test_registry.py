"""The registry of schemes, and the rule that only it distinguishes them by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from verl.config.names import QUANTIZATIONS
from verl.utils.quantization.schemes import SCHEME_NAMES, registered_scheme, weight_format_class
from verl.workers.rollout.quantization import scheme_class

PACKAGE = Path(__file__).resolve().parents[4] / "verl"


@pytest.mark.parametrize("name", ["mxfp8", "Ascend", "int4", "", "none"])
def test_unknown_value_lists_the_allowed_values(dense, make, name):
    with pytest.raises(ValueError, match=r"quantization=.*null or one of fp8, torchao, ascend"):
        make(name, dense)


def test_server_and_config_use_the_registered_names():
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    assert set(vllm_async_server._SUPPORTED_QUANTIZATION) == set(SCHEME_NAMES) == {"fp8", "torchao", "ascend"}
    assert QUANTIZATIONS == SCHEME_NAMES


@pytest.mark.parametrize("name", [None, *SCHEME_NAMES])
def test_each_name_has_both_halves(name):
    assert weight_format_class(name).name == name
    assert scheme_class(name).__name__ == registered_scheme(name).tensor_half.partition(":")[2]


def test_null_adds_no_engine_arguments(dense, make):
    assert make(None, dense).engine_overrides("cpu") == {}


def test_torch_free_halves_import_no_torch():
    code = "import sys; import verl.utils.quantization.schemes; print({'torch', 'vllm', 'ray'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def compared_names(tree):
    """Lines that compare a value with the name of a scheme, alone or in a collection."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            parts += [
                element for part in parts if isinstance(part, ast.Tuple | ast.List | ast.Set) for element in part.elts
            ]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        if any(isinstance(part, ast.Constant) and part.value in SCHEME_NAMES for part in parts):
            yield node.lineno if isinstance(node, ast.Compare) else node.value.lineno


def test_no_module_compares_the_name_of_a_scheme():
    """Behavior that depends on the scheme is an attribute or a method of the scheme."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in compared_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ['q == "fp8"', 'if "ascend" != q: pass', 'q in ("torchao", None)', 'match q:\n    case "fp8":\n        pass'],
)
def test_comparisons_with_a_name_are_found(code):
    assert list(compared_names(ast.parse(code)))
