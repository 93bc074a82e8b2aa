"""From the YAML of a recipe to plain values: what options can be given as, and nothing else.

Scalars stay the text that they are written as, because the option says what that text means: the
same as on the command line. YAML's own reading would make 1.1 of `model: 1.10`, 8 of `seed: 010`
and a date of `model: 2026-01-01`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

import yaml

Value = str | int | bool | None

_MAX_VALUES = (
    10_000  # once aliases are written out: nine aliases in a row can stand for 10^9 values
)
_MAX_NAMES = 100  # of one mapping; no command has as many options
_MAX_ENTRIES = 1000  # of a list; the parser of options takes seconds for some thousands
_MAX_DEPTH = 20

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = frozenset(
    _PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "value")
)
_LIST, _MAPPING, _NULL = _PREFIX + "seq", _PREFIX + "map", _PREFIX + "null"

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_SWITCHES = {"on": True, "off": False}  # the truth values of YAML that no option reads itself


class RecipeError(ValueError):
    """The text is no recipe; the argument says why, to go behind the name of the file."""


def read_options(text: str, nested: str, ignored: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        text: The recipe.
        nested: The option that is a mapping itself. Lists and mappings in it become JSON.
        ignored: A name that may hold anything; its value is not read.

    Returns:
        By name a text, whole number, truth value, None or list; a mapping for `nested`, a true
        placeholder for `ignored` where it is not null.

    Raises:
        RecipeError: The text is no YAML, no mapping of names, too large, or holds what no option
            takes.
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


def _compose(text: str) -> yaml.Node | None:
    """The nodes of the text, before any value is made of them."""
    try:
        node: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"is not YAML: {error.problem}{_place(error.problem_mark)}.") from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply for a recipe.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as characters of no code
        raise RecipeError(f"is not YAML: {error}.") from error
    return node


def _is_mapping(node: yaml.Node) -> TypeGuard[yaml.MappingNode]:
    return isinstance(node, yaml.MappingNode) and node.tag == _MAPPING


def _is_list(node: yaml.Node) -> TypeGuard[yaml.SequenceNode]:
    return isinstance(node, yaml.SequenceNode) and node.tag == _LIST


def _place(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


class _Reader:
    """Makes values of nodes, and counts them."""

    def __init__(self) -> None:
        self._values = 0

    def items(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
        """The entries of a mapping, each name once."""
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
        """A scalar, or a list of scalars."""
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
        """A scalar, or the JSON of a list or a mapping."""
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

    def _nested(self, node: yaml.Node, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise RecipeError(f"is nested too deeply for a recipe{_place(node.start_mark)}.")
        if isinstance(node, yaml.ScalarNode):
            text = self._text(node)
            try:
                value = yaml.constructor.SafeConstructor().construct_document(node)
            except (yaml.YAMLError, ValueError, OverflowError) as error:
                raise RecipeError(
                    f"holds what is no value{_place(node.start_mark)}: {error}."
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
            os.fsencode(text)  # paths may hold bytes that are no UTF-8, as halves of characters
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
