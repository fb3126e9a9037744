"""Check that every token of the tokenizer has a row in the model's embedding."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl.preflight.findings import Findings
from verl.utils.model_dir.copy_files import CONFIG_FILE, GENERATION_FILE
from verl.utils.model_dir.index import read_json_object
from verl.utils.model_dir.model_files import ModelFiles

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
_SHOWN = 5


def check_token_ids(field: str, files: ModelFiles, tokenizer: str, found: Findings) -> None:
    """Refuse ids without a row in the embedding if they are used; warn of other tokens without a row.

    A model with more rows than tokens is fine: rows are often padded to a multiple of some number.

    Args:
        field: the key that names the model.
        files: the model; the rows are its `vocab_size`.
        tokenizer: directory of the tokenizer.
    """
    rows = files.number("vocab_size")
    if rows is None:
        return
    try:
        settings, tokens = _read(Path(tokenizer))
        generation = _json(files.path / GENERATION_FILE)
    except ValueError as error:
        found.errors.append(f"{field}={files.path}: a file of the tokenizer or of the generation is damaged: {error}")
        return
    has_rows = f"the embedding of {files.path} has {rows} rows (vocab_size), for the ids 0 to {rows - 1}"
    for name, config in ((GENERATION_FILE, generation), (CONFIG_FILE, files.config)):
        for key in _SPECIAL_IDS:
            if beyond := [token for token in _ids(config.get(key)) if token >= rows]:
                found.errors.append(
                    f"{field}={files.path}: {key}={', '.join(map(str, beyond))} in {name}, but {has_rows}; correct "
                    "this id, or add the row to the model (resize_token_embeddings of transformers)"
                )
    absent = {text: token for text, token in tokens.items() if token >= rows}
    if not absent:
        return
    used = {text: token for text, token in absent.items() if text in _used_texts(Path(tokenizer), settings, absent)}
    way_out = (
        "add rows to the model (resize_token_embeddings of transformers, then save it), or use the tokenizer that "
        "belongs to this model"
    )
    if used:
        found.errors.append(
            f"{field}={files.path}: the tokenizer in {tokenizer} has {_shown(used)} as a special token or in its chat "
            f"template, but {has_rows}; {way_out}"
        )
    else:
        found.warnings.append(
            f"{field}={files.path}: the tokenizer in {tokenizer} has {_shown(absent)}, but {has_rows}. A prompt with "
            f"such a token ends the run; {way_out}"
        )


def different_tokens(policy: str, other: str) -> str | None:
    """Return how the tokens of another tokenizer differ from the policy's; None if they do not, or are not known.

    The other tokenizer may have more tokens: the policy generates none of them.

    Args:
        policy, other: directories of the tokenizers.
    """
    try:
        (_, tokens), (_, others) = _read(Path(policy)), _read(Path(other))
    except ValueError:
        return None  # damaged files are reported where they are used
    if not tokens or not others:
        return None
    different = {text: token for text, token in tokens.items() if others.get(text) != token}
    if not different:
        return None
    return f"its tokenizer lacks {len(different)} of the policy's {len(tokens)} tokens, or has them as other ids: " + (
        _shown(different)
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings of a tokenizer, and the ids of its tokens by text, as far as JSON files show them.

    Raises:
        ValueError: a file is damaged or has another form; the message names the file.
    """
    settings = _json(folder / _SETTINGS) | _json(folder / "special_tokens_map.json")
    main = _json(folder / _TOKENIZER)
    with _names(folder / _TOKENIZER):
        vocabulary = (main.get("model") or {}).get("vocab") or _json(folder / "vocab.json")
        if isinstance(vocabulary, list):  # pairs of token and score
            tokens = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        else:
            tokens = {text: token for text, token in vocabulary.items() if isinstance(token, int)}
        tokens |= {str(entry["content"]): _id(entry["id"]) for entry in main.get("added_tokens") or []}
    tokens |= {text: token for text, token in _json(folder / "added_tokens.json").items() if isinstance(token, int)}
    with _names(folder / _SETTINGS):
        decoder = settings.get("added_tokens_decoder") or {}
        tokens |= {str(entry["content"]): int(token) for token, entry in decoder.items()}
    return settings, tokens


@contextlib.contextmanager
def _names(file: Path) -> Iterator[None]:
    """Turn errors about the form of a file's content into errors that name the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{file}: has not the form of a tokenizer ({error!r}); copy it again") from error


def _id(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"id {value!r} is no whole number")
    return value


def _used_texts(folder: Path, settings: Mapping[str, Any], texts: Mapping[str, int]) -> Iterator[str]:
    """Iterate over the texts that a run uses: the tokenizer's special tokens by name, and those in the template."""
    for name in ("eos_token", "pad_token", "bos_token"):
        value = settings.get(name)
        yield str(value.get("content") if isinstance(value, dict) else value)
    # A text of several characters, so that a letter of the template's code is not taken for a token.
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else str(settings.get("chat_template"))
    yield from (text for text in texts if len(text) > 1 and text in template)


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if os.path.isfile(path) else {}


def _shown(tokens: Mapping[str, int]) -> str:
    names = [f"{text!r} ({token})" for text, token in sorted(tokens.items(), key=lambda item: item[1])[:_SHOWN]]
    return ", ".join(names) + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")
