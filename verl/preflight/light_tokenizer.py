"""A tokenizer for prompts without transformers, whose import takes seconds and imports torch.

It reads tokenizer.json and the chat template, and has the methods that `verl.utils.dataset.prompts` needs. The tokens
are equal to those of the transformers tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

_TEMPLATE_FILE, _SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"


class LightTokenizer:
    """The `tokenizer.json` of a directory with its chat template.

    Attributes:
        chat_template: the default template, or None.
        name_or_path: the directory.
        unk_token_id: id of the token for unknown text, or None.

    Raises:
        ValueError: tokenizer.json is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name_or_path = str(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: has no tokenizer.json; copy it there")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            settings = _json(Path(folder) / _SETTINGS_FILE) | _json(Path(folder) / "special_tokens_map.json")
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ValueError(f"{path}: not readable ({error}); copy it again") from error
        self.chat_template = _template(Path(folder), settings)
        self._special = {name: _text(value) for name, value in settings.items() if name.endswith("_token") and value}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unk_token_id = None if unknown is None else self._tokenizer.token_to_id(unknown)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, return_dict: bool, **variables: Any
    ) -> list[int]:
        """Return the token ids of the messages; called with the keywords of `prompt_token_ids`."""
        assert self.chat_template is not None and tokenize and not return_dict
        rendered = (
            _environment()
            .from_string(self.chat_template)
            .render(messages=messages, tools=None, documents=None, **self._special, **variables)
        )
        return self._tokenizer.encode(rendered, add_special_tokens=False).ids


class _Generation(Extension):
    """The tag `{% generation %}`, which marks text of the model; here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def read_template(folder: Path) -> str | None:
    """Return the default chat template of a tokenizer; None without one."""
    return _template(folder, _json(folder / _SETTINGS_FILE))


def template_problem(folder: Path) -> str | None:
    """Return why the default chat template of a tokenizer cannot be used; None if it can, or if there is none.

    Only its syntax is checked. A damaged `tokenizer_config.json` has other checks.
    """
    file = folder / _TEMPLATE_FILE
    try:
        settings = _json(folder / _SETTINGS_FILE)
        template = _template(folder, settings if isinstance(settings, dict) else {})
    except UnicodeDecodeError as error:
        damaged = file if file.is_file() else folder / _SETTINGS_FILE
        return f"{damaged.name} is not a UTF-8 text file (byte {error.start}); copy it again"
    except (OSError, ValueError, RecursionError):
        return None
    except (AttributeError, KeyError):
        return (
            f"chat_template in {_SETTINGS_FILE} must be text, or a list of objects with name and template; correct it"
        )
    name = _TEMPLATE_FILE if file.is_file() else f"chat_template in {_SETTINGS_FILE}"
    if template is None:
        return None
    if not isinstance(template, str):
        return f"{name} must be text, and is {template!r:.80}; correct it"
    try:
        _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"{name} is not a valid template, at line {error.lineno}: {error.message}; correct it"
    return None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):  # several templates by name
        given = next((entry["template"] for entry in given if entry.get("name") == "default"), None)
    return given


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
