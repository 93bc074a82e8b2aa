"""Records of JSON, one after the other: a list, or one object per line."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from molf.errors import InputError, reason_of
from molf.inputs import as_text

Record = dict[str, Any]

_WINDOW = 2**20  # bytes of a list that are in memory at once, at least
_LONGEST = 2**31 - 1  # bytes of a line; without a limit, a file of zeros would fill the memory
_SPACE = " \t\r\n"


class DuplicateKeyError(Exception):
    """An object has a duplicate key; the argument is the key."""


def unique_json(text: str) -> Any:
    """Parse JSON without duplicate keys in objects.

    Raises:
        DuplicateKeyError: An object has a duplicate key.
        ValueError: The text is not JSON.
    """
    return _DECODER.decode(text)


def json_records(opened: Callable[[], BinaryIO], shown: str) -> Iterator[Record]:
    """Yield the objects of a JSON list or of JSON lines, distinguished by content.

    Args:
        opened: Opens the file; called again for the message about a wrong list.
        shown: The file's name in messages.

    Raises:
        InputError: The file is not UTF-8 or not JSON (with its line), or contains a value that is
            not an object.
    """
    with opened() as file:
        is_list = _begins_a_list(file)
    if is_list:
        with opened() as file:
            values = enumerate(_of_list(file, opened, shown))
            yield from (_object(value, shown, index) for index, value in values)
        return
    with opened() as file:
        index = 0
        for number, line in enumerate(text_lines(file, shown), start=1):
            if line.strip():
                yield _object(_parse(line.removesuffix("\n"), shown, number), shown, index)
                index += 1


def text_lines(file: BinaryIO, shown: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, split at line feeds alone.

    Raises:
        InputError: A line is not UTF-8, or is too long.
    """
    start = 0
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise InputError(f"{shown}: a line is longer than {_LONGEST:,} bytes.")
        yield as_text(line, shown, start)
        start += len(line)


def _begins_a_list(file: BinaryIO) -> bool:
    # A line of JSON lines must be an object, so a list is the whole file.
    rest = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while not (text := rest.lstrip()) and (rest := file.read(_WINDOW)):
        pass
    return text.startswith(b"[")


def _of_list(file: BinaryIO, opened: Callable[[], BinaryIO], shown: str) -> Iterator[Any]:
    """Yield the values of a list, of which a window is in memory."""
    count = 0
    try:
        for value in _objects(file):
            yield value
            count += 1
    except DuplicateKeyError as error:
        raise _comes_twice(f"{shown}, record {count}", error) from error
    except ValueError:
        # For the line of the fault, and for values that are not objects: read the whole list.
        with opened() as again:
            values = _parse(as_text(again.read(), shown), shown, line=1)
        yield from values[count:]


def _objects(file: BinaryIO) -> Iterator[Any]:
    """Yield the objects of a list.

    Raises:
        DuplicateKeyError: The next object has a duplicate key.
        ValueError: The file is not UTF-8, or no list of objects.
    """
    text = _Text(file)
    if not text.take("["):
        raise ValueError("no list")
    is_first = True
    while not text.take("]"):
        if not is_first and not text.take(","):
            raise ValueError("no comma")
        is_first = False
        yield text.take_object()
    if not text.is_at_end():
        raise ValueError("more text")


class _Text:
    """The text of a file in UTF-8, of which a part is in memory.

    Args:
        file: The file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position = "", 0

    def take(self, character: str) -> bool:
        """Return whether a character comes next, after any space; go behind it if it does."""
        self._skip_space()
        found = self._text.startswith(character, self._position)
        self._position += found
        return found

    def take_object(self) -> Any:
        """Return the object that comes next, and go behind it.

        Raises:
            DuplicateKeyError: It has a duplicate key.
            ValueError: No object comes next.
        """
        self._skip_space()
        # The end of an object is certain; that of a number at the end of the window is not.
        if not self._text.startswith("{", self._position):
            raise ValueError("no object")
        while True:
            try:
                value, self._position = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if not self._read(max(_WINDOW, len(self._text) - self._position)):
                    raise ValueError("no JSON") from error
            else:
                return value

    def is_at_end(self) -> bool:
        """Return whether only space follows."""
        self._skip_space()
        return self._position == len(self._text)

    def _skip_space(self) -> None:
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._text) or not self._read(_WINDOW):
                return

    def _read(self, size: int) -> bool:
        """Read so many bytes, and forget the text before the position; return whether any came."""
        chunk = self._file.read(size)
        rest = self._text[self._position :]
        self._text, self._position = rest + self._decoder.decode(chunk, final=not chunk), 0
        return bool(chunk)


def _object(value: Any, shown: str, index: int) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{shown}, record {index}: is not an object but {type(value).__name__}.")
    return value


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; reject duplicate keys, of which json drops all but the last."""
    # Interned: otherwise each record has its own copy of the names.
    made = {sys.intern(name): value for name, value in pairs}
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicate_keys)


def _parse(text: str, path: str, line: int) -> Any:
    """Parse a JSON text that starts at the given line of a file."""
    try:
        return unique_json(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}). "
            "The file must hold a list of records, or one record per line."
        ) from error
    except DuplicateKeyError as error:
        raise _comes_twice(f"{path}, line {line}", error) from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise InputError(f"{path}, line {line}: not usable JSON ({reason_of(error)}).") from error


def _comes_twice(where: str, error: DuplicateKeyError) -> InputError:
    return InputError(f"{where}: the key {error.args[0]!r:.100} comes twice in one object.")
