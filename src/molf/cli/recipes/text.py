"""Read the YAML of a recipe into plain option values.

Scalars stay text, and the option's type converts them, as on the command line. YAML's own types
would turn `model: 1.10` into 1.1, `seed: 010` into 8 and `model: 2026-01-01` into a date.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

import yaml

Value = str | int | bool | None

_MAX_VALUES = 10_000  # with aliases expanded: nine nested aliases can stand for 10^9 values
_MAX_NAMES = 100  # per mapping; no command has as many options
_MAX_ENTRIES = 1000  # per list; cyclopts takes seconds for some thousands
_MAX_DEPTH = 20

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = frozenset(
    _PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "value")
)
_LIST, _MAPPING, _NULL = _PREFIX + "seq", _PREFIX + "map", _PREFIX + "null"

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_SWITCHES = {"on": True, "off": False}  # YAML's booleans that cyclopts does not convert


class RecipeError(ValueError):
    """The text is no recipe. The message continues a sentence that begins with the file name."""


def read_options(text: str, nested: str, ignored: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        text: The recipe.
        nested: The option that is a mapping itself. Lists and mappings in it become JSON.
        ignored: A name with any value, which is not read.

    Returns:
        By name a string, integer, boolean, None or list; a mapping for `nested`; True for
        `ignored` if it is not null.

    Raises:
        RecipeError: The text is not YAML, not a mapping of names, too large, or has a value of a
            wrong kind.
    """
    root = _compose(text)
    if root is None or root.tag == _NULL:
        return {}
    reader = _Reader()
    if not _is_mapping(root):
        kind = {"seq": "list", "map": "mapping"}.get(root.tag.removeprefix(_PREFIX), "text")
        raise RecipeError(f"must hold options as 'name: value', not a {kind}.")
    options: dict[str, Any] = {}
    for name, node in reader.items(root):
        if name == ignored:
            options[name] = None if node.tag == _NULL else True
        elif name == nested and _is_mapping(node):
            options[name] = {key: reader.argument(value) for key, value in reader.items(node)}
        else:
            options[name] = reader.option(name, node)
    return options


def read_nested(text: str) -> dict[str, Any]:
    """Read a mapping with lists and mappings inside, such as a study.

    Returns:
        By name a string, integer, boolean, None, list or mapping.

    Raises:
        RecipeError: As `read_options`.
    """
    root = _compose(text)
    if root is None or not _is_mapping(root):
        raise RecipeError("must hold a mapping of names to values.")
    reader = _Reader()
    return {name: reader.plain(node, 1) for name, node in reader.items(root)}


def _compose(text: str) -> yaml.Node | None:
    """Return the node tree of the text, without converting values."""
    try:
        node: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"is not YAML: {error.problem}{_place(error.problem_mark)}.") from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply for a recipe.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an escape "\UFFFFFFFF"
        raise RecipeError(f"is not YAML: {error}.") from error
    return node


def _is_mapping(node: yaml.Node) -> TypeGuard[yaml.MappingNode]:
    return isinstance(node, yaml.MappingNode) and node.tag == _MAPPING


def _is_list(node: yaml.Node) -> TypeGuard[yaml.SequenceNode]:
    return isinstance(node, yaml.SequenceNode) and node.tag == _LIST


def _place(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


class _Reader:
    """Converts nodes to values, and counts the values."""

    def __init__(self) -> None:
        self._values = 0

    def items(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
        """Yield the entries of a mapping; reject a repeated or wrong name."""
        seen: set[str] = set()
        if len(node.value) > _MAX_NAMES:
            raise RecipeError(
                f"gives {len(node.value)} names at once{_place(node.start_mark)}; "
                f"{_MAX_NAMES} are allowed."
            )
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"is not YAML: found no name{_place(key.start_mark)}.")
            name = self._text(key)
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"holds a wrong name: {name or repr(name)} is not the name of an option."
                )
            if name in seen:
                raise RecipeError(f"is not YAML: {name!r} is given twice{_place(key.start_mark)}.")
            seen.add(name)
            yield name, value

    def option(self, name: str, node: yaml.Node) -> Value | list[Value]:
        """Return a scalar or a list of scalars."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if not _is_list(node):
            self._refuse(name, node)
        if len(node.value) > _MAX_ENTRIES:
            raise RecipeError(
                f"gives {len(node.value)} values for {name}; {_MAX_ENTRIES} are allowed."
            )
        found: list[Value] = []
        for entry in node.value:
            if not isinstance(entry, yaml.ScalarNode) or entry.tag == _NULL:
                self._refuse(name, entry)
            found.append(self._scalar(entry))
        return found

    def argument(self, node: yaml.Node) -> Value:
        """Return a scalar, or a list or mapping as JSON."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        try:
            return json.dumps(self._nested(node, 0), allow_nan=False)
        except ValueError as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(
                f"holds a number that is not finite{_place(node.start_mark)}."
            ) from error

    def plain(self, node: yaml.Node, depth: int) -> Any:
        """Return a scalar as `option` does, or a list or mapping of them, at any depth."""
        if depth > _MAX_DEPTH:
            raise RecipeError(f"is nested too deeply{_place(node.start_mark)}.")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._count()
        if _is_list(node):
            return [self.plain(entry, depth + 1) for entry in node.value]
        if not _is_mapping(node):
            self._refuse_tag(node)
        return {key: self.plain(entry, depth + 1) for key, entry in self.items(node)}

    def _nested(self, node: yaml.Node, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise RecipeError(f"is nested too deeply for a recipe{_place(node.start_mark)}.")
        if isinstance(node, yaml.ScalarNode):
            text = self._text(node)
            try:
                value = yaml.constructor.SafeConstructor().construct_document(node)
            except (yaml.YAMLError, ValueError, OverflowError) as error:
                raise RecipeError(
                    f"holds an invalid value{_place(node.start_mark)}: {error}."
                ) from error
            return value if isinstance(value, (int, float, type(None))) else text
        self._count()
        if _is_list(node):
            return [self._nested(entry, depth + 1) for entry in node.value]
        if not _is_mapping(node):
            self._refuse_tag(node)
        return {key: self._nested(entry, depth + 1) for key, entry in self.items(node)}

    def _scalar(self, node: yaml.ScalarNode) -> Value:
        text = self._text(node)
        if node.tag == _NULL:
            return None
        if node.style is None and text.lower() in _SWITCHES:
            return _SWITCHES[text.lower()]
        return int(text) if _PLAIN_INTEGER.fullmatch(text) else text

    def _count(self) -> None:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise RecipeError(f"holds more than {_MAX_VALUES} values, aliases written out.")

    def _text(self, node: yaml.ScalarNode) -> str:
        self._count()
        if node.tag not in _SCALARS and node.tag != _PREFIX + "merge":
            self._refuse_tag(node)
        text = str(node.value)
        try:
            os.fsencode(text)  # accepts paths with bytes that are not UTF-8, as lone surrogates
        except UnicodeEncodeError as error:
            raise RecipeError(f"holds half a character{_place(node.start_mark)}.") from error
        if "\0" in text:
            raise RecipeError(f"holds a null byte{_place(node.start_mark)}.")
        return text

    def _refuse(self, name: str, node: yaml.Node) -> NoReturn:
        if node.tag not in _SCALARS | {_LIST, _MAPPING}:
            self._refuse_tag(node)
        kind = {_LIST: "a list in a list", _MAPPING: "a mapping"}.get(node.tag, "an empty entry")
        raise RecipeError(
            f"holds {kind} for {name}{_place(node.start_mark)}; a value or a list of values "
            "is allowed."
        )

    def _refuse_tag(self, node: yaml.Node) -> NoReturn:
        tag = node.tag.replace(_PREFIX, "!!")
        raise RecipeError(
            f"holds a value of the kind {tag}{_place(node.start_mark)}; texts, numbers, truth "
            "values and lists are allowed."
        )
