"""YAML files that users write: faults with their line, before a parser meets them.

A parser accepts some contents or crashes at them: of a key that stands twice only the last value counts, an alias can
contain itself, and aliases of aliases can stand for billions of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

_PLAIN = "tag:yaml.org,2002:"
# `timestamp` and `merge` are the tags of plain text such as 2026-01-31 and <<.
_TAGS = {f"{_PLAIN}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge")}

_MAX_VALUES = 20_000
_TOO_DEEP = "nested too deeply; flatten it"
# Errors of values such as `!!int x`, and of a number with thousands of digits.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, yaml.YAMLError)


class YamlFileError(ValueError):
    """A YAML file that cannot be used; the message has the line and the way out, and not the name of the file."""


def read_node(path: Path) -> yaml.Node | None:
    """Return the content of a YAML file as a tree with line numbers; None if the file holds no value.

    Raises:
        YamlFileError: the file is no text in UTF-8 or no YAML, or holds several documents, a tag, a key twice, or an
            alias that contains itself.
        OSError: the file cannot be read.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlFileError(
            f"line {line}: the byte {raw[error.start]:#04x} is not UTF-8 text; save the file as UTF-8"
        ) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFileError(f"line {line}: the character {chr(error.character)!r} is not allowed; remove it") from error
    except yaml.MarkedYAMLError as error:
        raise YamlFileError(_syntax_problem(error)) from error
    except RecursionError as error:
        raise YamlFileError(_TOO_DEEP) from error
    if node is not None:
        try:
            _check(node, {}, [])
        except RecursionError as error:
            raise YamlFileError(_TOO_DEEP) from error
    return node


def line_of(node: yaml.Node) -> int:
    """Return the line of a value, counted from 1."""
    return node.start_mark.line + 1


def items_of(node: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield key and value of a mapping; nothing for other values."""
    if isinstance(node, yaml.MappingNode):
        yield from node.value


def describe(node: yaml.Node) -> str:
    """Return a value as an error message shows it."""
    if isinstance(node, yaml.ScalarNode):
        return "empty" if node.tag == f"{_PLAIN}null" else repr(node.value)[:80]
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f"line {mark.line + 1}: "
    problem = error.problem or "is not YAML"
    if "another document" in problem:
        return f"{line}a second document begins; keep one, and remove the line ---"
    if "'\\t'" in problem:
        return f"{line}is not YAML, because a tab indents it; indent with spaces"
    context = f" {error.context}" if error.context else ""
    return f"{line}is not YAML ({problem}{context}); correct it"


def _check(node: yaml.Node, sizes: dict[int, int], parents: list[int]) -> int:
    """Check a value and return the number of values in it, those behind aliases each time.

    Args:
        sizes: the numbers of the values that were checked before, by identity.
        parents: identities of the values that contain this one.
    """
    if id(node) in parents:
        raise YamlFileError(f"line {line_of(node)}: contains itself through an alias; write the value without *")
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _TAGS:
        tag = node.tag.replace(_PLAIN, "!!")
        raise YamlFileError(
            f"line {line_of(node)}: the tag {tag} is not supported; write plain text, a list or a mapping"
        )
    size, inner = 1, [*parents, id(node)]
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_check(value, sizes, inner) for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(value, sizes, inner) for value in node.value)
    else:
        _check_scalar(node)
    if size > _MAX_VALUES:
        raise YamlFileError(f"line {line_of(node)}: stands for more than {_MAX_VALUES} values; use fewer aliases")
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlFileError(f"line {line_of(key)}: {describe(key)} is a key; a key must be text, in one line")
        name, line = (key.tag, key.value), line_of(key)
        if name in lines and not key.tag.endswith(":merge"):
            raise YamlFileError(
                f"line {line}: the key {key.value!r} stands in line {lines[name]} too, and only one would count; "
                "remove one of them"
            )
        lines[name] = line


def _check_scalar(node: yaml.Node) -> None:
    try:
        yaml.SafeLoader("").construct_object(node)
    except _UNREADABLE as error:
        kind = node.tag.removeprefix(_PLAIN)
        raise YamlFileError(
            f"line {line_of(node)}: {describe(node)} cannot be read as {kind}; correct it, or write it as 'text'"
        ) from error
