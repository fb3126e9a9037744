"""The small files that a trained model has in common with its source: everything except config.json and weights.

They are copied byte by byte. Reading and writing them with transformers would lose fields that the installed version
does not know, write other formats than the source's, and reject what its validation rejects.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_FILE, GENERATION_FILE, CODE_SUFFIX = "config.json", "generation_config.json", ".py"
TEMPLATES_DIRECTORY = "additional_chat_templates"
_SUFFIXES = (CODE_SUFFIX, ".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm")
_LICENSES = ("LICENSE", "NOTICE", "USE_POLICY")
_VERSIONED = "tokenizer.model"  # a tokenizer of Mistral is tokenizer.model.v3
# Files that belong to the weights, or to the program that wrote the source.
_LEFT_OUT = (
    CONFIG_FILE,
    "adapter_config.json",
    "all_results.json",
    "quant_model_description.json",
    "train_results.json",
    "trainer_state.json",
)
# Files of the model that are not part of its tokenizer.
_OF_MODEL = (GENERATION_FILE, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def copy_model_files(model: Path, tokenizer: Path, target: Path, *, generates: bool = True) -> None:
    """Copy the generation config, tokenizer, chat templates, preprocessors, Python code and licenses.

    Args:
        model: directory of the model.
        tokenizer: directory of the tokenizer, often the same. The tokenizer's files and the code that its
            `tokenizer_config.json` names come from here; all other files come from `model`.
        target: existing directory.
        generates: copy the generation config, which only a language model has.

    Raises:
        OSError: a file cannot be read or written.
    """
    chosen = {name: model / name for name in shared_files(model)}
    if not (tokenizer.exists() and tokenizer.samefile(model)):
        chosen = {name: path for name, path in chosen.items() if _is_of_model(name)}
        named = _code_of_tokenizer(tokenizer)
        for name in shared_files(tokenizer):
            is_code = name.endswith(CODE_SUFFIX)
            if (name in named or name not in chosen) if is_code else not _is_of_model(name):
                chosen[name] = tokenizer / name
    if not generates:
        chosen.pop(GENERATION_FILE, None)
    for name, path in chosen.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def shared_files(directory: Path) -> Iterator[str]:
    """Iterate over the names of the files that a trained model has in common with its source."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and (path.suffix in _SUFFIXES or path.stem in (*_LICENSES, _VERSIONED)):
            if path.name not in _LEFT_OUT and not path.name.endswith(".index.json"):
                yield path.name
        elif path.is_dir() and path.name == TEMPLATES_DIRECTORY:
            yield from (f"{path.name}/{file.name}" for file in sorted(path.glob("*.jinja")))


def _is_of_model(name: str) -> bool:
    return name in _OF_MODEL or name.endswith(CODE_SUFFIX) or Path(name).stem in _LICENSES


def _code_of_tokenizer(tokenizer: Path) -> set[str]:
    """Return the names of the Python files in which `tokenizer_config.json` finds its classes."""
    file = tokenizer / "tokenizer_config.json"
    if not file.is_file():
        return set()
    values: Any = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {})
    classes = [name for value in values.values() for name in (value if isinstance(value, list) else [value])]
    return {name.rpartition(".")[0] + CODE_SUFFIX for name in classes if isinstance(name, str) and "--" not in name}
