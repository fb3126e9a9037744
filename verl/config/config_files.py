"""The user's YAML files for Hydra: checked as Hydra loads them, and Hydra's errors as one text each."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import ClassVar

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf.errors import OmegaConfBaseException

from verl.config import build
from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.extension.yaml_file import YamlFileError, describe, items_of, line_of, read_node

_FULL_ERROR = "HYDRA_FULL_ERROR"
_NULL = "tag:yaml.org,2002:null"
# Kinds of errors of Hydra and of the libraries that it reads files with.
_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OSError)
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_FOLDER = re.compile(r"path=file://(.*)$", re.MULTILINE)
# Lines of an error of OmegaConf that tell a user nothing.
_NOISE = ("object_type=", "full_key:", "reference_type=")
_ENTRY = "an entry of defaults must be a name, or group: name"


class FileConfigSource(file_config_source.FileConfigSource):
    """A directory of YAML files that checks each file first. Hydra's registry tells sources apart by this name.

    Class attributes:
        defaults: of each loaded file, by its name in the directory: the file, and the names that it includes with their
            lines.
    """

    defaults: ClassVar[dict[str, tuple[Path, dict[str, int]]]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file; ConfigError if it cannot be used."""
        name = self._normalize_file_name(config_path)
        path = Path(self.path) / name
        if not path.is_file():
            return super().load_config(config_path)
        try:
            node = read_node(path)
            _check_top(node, is_root=os.sep not in name)
            _check_sections(node, path, is_root=os.sep not in name)
            self.defaults[name.removesuffix(".yaml")] = path, _included(node, os.path.dirname(name))
            return super().load_config(config_path)
        except YamlFileError as error:
            raise ConfigError([f"{path}: {error}"]) from error
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read ({error.strerror or error})"]) from error
        except OmegaConfBaseException as error:
            raise ConfigError([f"{path}: {_text_of(error)}; correct it"]) from error


@contextmanager
def checked_files(config_name: str, problems: Mapping[str, str]) -> Iterator[None]:
    """Within the block, Hydra checks the user's files, and its errors are ConfigErrors.

    Args:
        config_name: name of the file that Hydra is to compose.
        problems: further problems of the config, for the ConfigError.
    """
    types = SourcesRegistry.instance().types
    original, full_error = types["file"], os.environ.get(_FULL_ERROR)
    types["file"], os.environ[_FULL_ERROR] = FileConfigSource, "1"  # without it Hydra prints its errors and exits
    FileConfigSource.defaults.clear()
    try:
        yield
    except ConfigError as error:
        raise ConfigError([*problems.values(), *error.problems]) from error
    except MissingConfigException as error:
        raise ConfigError([*problems.values(), _missing_file(error, config_name)]) from error
    except RecursionError as error:
        raise ConfigError([*problems.values(), _endless(config_name)]) from error
    except _ERRORS as error:
        raise ConfigError(
            [*problems.values(), f"--config-name={config_name}: {_text_of(error)}; correct it"]
        ) from error
    finally:
        types["file"] = original
        os.environ.pop(_FULL_ERROR)
        if full_error is not None:
            os.environ[_FULL_ERROR] = full_error


def _check_top(node: yaml.Node | None, *, is_root: bool) -> None:
    """Check that a file is a mapping; a file of a group may be empty."""
    if node is None or node.tag == _NULL:
        if is_root:
            raise YamlFileError("is empty; write keys, or leave out --config-name")
        return
    if not isinstance(node, yaml.MappingNode):
        raise YamlFileError(f"line {line_of(node)}: {describe(node)} is no mapping; write keys, as in data: {{...}}")
    for key, _ in items_of(node):
        if not key.tag.endswith((":str", ":merge")):
            raise YamlFileError(f"line {line_of(key)}: the key {key.value!r} is no text; write a key of verl")


def _check_sections(node: yaml.Node | None, path: Path, *, is_root: bool) -> None:
    """Check that the sections of a file, which Hydra would replace by a value, are mappings."""
    package = _PACKAGE.search(path.read_text(encoding="utf-8-sig"))
    if not is_root or (package and package[1] != "_global_"):
        return  # its keys are below those of another place
    sections = build.sections(PPOConfig)
    pending = [(key.value, key, value) for key, value in items_of(node)]
    while pending:
        name, key, value = pending.pop()
        if name not in sections or value.tag == _NULL:
            continue
        if isinstance(value, yaml.ScalarNode) and "${" in value.value:
            continue
        if not isinstance(value, yaml.MappingNode):
            raise YamlFileError(
                f"line {line_of(key)}: {name} is {describe(value)}, but it is a section; write its keys below it"
            )
        pending += [(f"{name}.{inner.value}", inner, item) for inner, item in items_of(value)]


def _included(node: yaml.Node | None, group: str) -> dict[str, int]:
    """Return the names in the defaults of a file with their lines.

    Args:
        group: the folder of the file.

    Raises:
        YamlFileError: the defaults are no list of names.
    """
    found: dict[str, int] = {}
    defaults = next((value for key, value in items_of(node) if key.value == "defaults"), None)
    if defaults is None:
        return found
    if not isinstance(defaults, yaml.SequenceNode):
        raise YamlFileError(f"line {line_of(defaults)}: defaults is {describe(defaults)}; it must be a list of names")
    for entry in defaults.value:
        pairs: list[tuple[yaml.ScalarNode | None, yaml.Node]] = [*items_of(entry)] or [(None, entry)]
        folder, value = pairs[0]
        is_name = isinstance(value, yaml.ScalarNode) and (value.tag.endswith(":str") or folder is not None)
        if len(pairs) > 1 or not (is_name or (folder is not None and isinstance(value, yaml.SequenceNode))):
            raise YamlFileError(f"line {line_of(entry)}: {describe(entry)} in defaults; {_ENTRY}")
        of_folder = "" if folder is None else f"{folder.value.split(' ')[-1].partition('@')[0]}/"
        names = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for name in names:
            text = of_folder + str(name.value).split(" ")[-1].partition("@")[0].removesuffix(".yaml")
            full = text[1:] if text.startswith("/") else os.path.join(group, text)
            found[full] = line_of(entry)
    return found


def _endless(config_name: str) -> str:
    """Return the error text for files that include each other without end."""
    names = FileConfigSource.defaults
    for start in names:
        chain, seen = [start], {start}
        while chain:
            path, included = names[chain.pop()]
            if start in included:
                return f"{path}: line {included[start]}: the defaults include the file {start} without end; remove it"
            new = [name for name in included if name in names and name not in seen]
            chain, seen = chain + new, seen | {*new}
    return f"--config-name={config_name}: nested too deeply; flatten the file"


def _missing_file(error: MissingConfigException, config_name: str) -> str:
    """Return the error text for a file that does not exist, with similar names."""
    folders = [Path(folder) for folder in _FOLDER.findall(str(error))]
    own = sorted(file.name for file in resources.files("verl.trainer.config").iterdir() if file.name.endswith(".yaml"))
    present = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))]
    known = [file.stem for file in present if file.is_file()]
    known += [name.removesuffix(".yaml") for name in own]
    places = [*map(str, folders), "verl's own files"]
    text = f"looked in {' and '.join(places)}"
    if "primary config" not in str(error):
        return f"{_text_of(error)} ({text}); correct the name in defaults"
    if os.sep in config_name:
        return f"--config-name={config_name}: is a path; give its directory in --config-path, and its name here"
    wanted = config_name.removesuffix(".yaml")
    if any(file.stem == wanted and file.is_dir() for file in present):
        return f"--config-name={config_name}: {wanted}.yaml is a directory ({text}); give the name of a file"
    near: Sequence[str] = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "give the name of a file without .yaml"
    return f"--config-name={config_name}: there is no file {wanted}.yaml ({text}); {hint}"


def _text_of(error: Exception) -> str:
    """Return the message of an error of Hydra or OmegaConf in one line."""
    lines = [line.strip() for line in str(error).partition("Config search path")[0].splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
    key = getattr(error, "full_key", None)
    return (f"{key}: " if key else "") + (text or type(error).__name__)
