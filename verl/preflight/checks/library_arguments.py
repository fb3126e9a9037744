"""Checks of arguments that a config passes on to vLLM and Ray: their names, by the source of the installed packages.

The packages are not imported, because that takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.config.engine_pools import engine_pools
from verl.config.ppo import PPOConfig
from verl.extension.source import parse_python
from verl.preflight.findings import Findings
from verl.preflight.target import Target

_RAY_INIT = "ray_kwargs.ray_init"
_ROLLOUT = "actor_rollout_ref.rollout"


def check_engine_arguments(config: PPOConfig, target: Target, found: Findings) -> None:
    """Check the names in `engine_kwargs.vllm` of every engine."""
    rollout = config.actor_rollout_ref.rollout
    engines: list[tuple[str, Any]] = [(_ROLLOUT, rollout)]
    engines += [(pool.engine_section, pool.engine) for pool in engine_pools(config)]
    for section, engine in engines:
        given = engine.engine_kwargs.get("vllm") or {}
        if isinstance(given, dict):
            field = f"{section}.engine_kwargs.vllm"
            _check_names(field, given, engine_argument_names(), "AsyncEngineArgs", target, found)


def check_ray_arguments(config: PPOConfig, target: Target, found: Findings) -> None:
    """Check the names in `ray_kwargs.ray_init`, and that numbers of cores and devices are numbers."""
    given = {name: value for name, value in config.ray_kwargs.ray_init.items() if value is not None}
    # Names with an underscore are arguments for Ray's own tests, which its signature does not have.
    public = {name: value for name, value in given.items() if not name.startswith("_")}
    _check_names(_RAY_INIT, public, ray_argument_names(), "ray.init", target, found)
    for name in ("num_cpus", "num_gpus"):
        value = given.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < 2**31):
            found.errors.append(f"{_RAY_INIT}.{name}={value}: must be a number from 0, or null")


def _check_names(
    field: str, given: dict[str, Any], known: frozenset[str] | None, function: str, target: Target, found: Findings
) -> None:
    for name in sorted(set() if known is None else set(map(str, given)) - known):
        near = difflib.get_close_matches(name, known or (), n=1)
        text = (
            f"{field}.{name}: {function} of the installed release has no such argument; "
            f"{f'did you mean {near[0]}?' if near else 'remove it'}"
        )
        # Another machine may have another release.
        (found.errors if target.hardware is None else found.warnings).append(text)


@functools.cache
def engine_argument_names() -> frozenset[str] | None:
    """Return the fields of vLLM's AsyncEngineArgs; None if vLLM is not installed, or has another structure."""
    tree = _parsed("vllm", "engine/arg_utils.py")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)} if tree is not None else {}
    names = {
        node.target.id
        for name in ("EngineArgs", "AsyncEngineArgs")
        for node in (classes[name].body if name in classes else ())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return frozenset(names) or None


@functools.cache
def ray_argument_names() -> frozenset[str] | None:
    """Return the named arguments of ray.init; None if Ray is not installed, or has another structure."""
    tree = _parsed("ray", "_private/worker.py")
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef) and node.name == "init":
            arguments = node.args
            return frozenset(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    return None


def _parsed(package: str, path: str) -> ast.Module | None:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder, path)
        if file.is_file():
            return parse_python(file)
    return None
