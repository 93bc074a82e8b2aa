"""Mask secrets in all text that is printed or written to files.

A secret is recognised by its form (`shapes`), by the name before it (`named`), by its place in an
address (`addresses`), or because it was given to this process (`known`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from molf.masking.addresses import MASK, strip_addresses
from molf.masking.known import is_secret_option, known_secrets, learn, mask_known
from molf.masking.named import mask_named
from molf.masking.names import is_secret_name, is_secret_of_any_form
from molf.masking.shapes import mask_shapes
from molf.shown import map_texts

__all__ = ["MASK", "learn", "mask", "mask_given", "mask_text"]

_Known = tuple[tuple[str, str], ...]


def mask_text(text: str) -> str:
    """Return the text with secrets masked; addresses lose user, password, query and fragment."""
    return _mask_text(text, known_secrets())


def mask(value: Any) -> Any:
    """Return a JSON or YAML value, or a command line as a list, with secrets masked."""
    return _mask(value, known_secrets())


def mask_given(value: Any) -> Any:
    """Return a JSON value with only those secrets masked that were given to this process."""
    # For data records and model answers, in which an address or `password=` is no secret.
    known = known_secrets()
    return map_texts(value, lambda text: mask_known(text, known))


def _mask_text(text: str, known: _Known) -> str:
    # Known secrets first: an address that holds one is found as a whole.
    text = strip_addresses(mask_known(text, known))
    return mask_named(mask_shapes(text))


def _mask(value: Any, known: _Known) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _blank(entry) if _is_secret(name, entry) else _mask(entry, known)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            MASK if _is_value(before, entry) else _mask_argument(entry, known)
            for before, entry in zip((None, *value), value, strict=False)
        ]
    if isinstance(value, PurePath):
        value = str(value)
    return _mask_text(value, known) if isinstance(value, str) else value


def _is_secret(name: Any, entry: Any) -> bool:
    """Return whether an entry of a mapping is a secret. A number named `token` is none."""
    if not isinstance(name, str) or not is_secret_name(name):
        return False
    if not entry or isinstance(entry, bool):
        return False
    return isinstance(entry, str) or is_secret_of_any_form(name)


def _blank(entry: Any) -> Any:
    """Return the mask for a secret; in a mapping, numbers stay, as they may be counts."""
    if isinstance(entry, Mapping):
        return {
            name: value if isinstance(value, (int, float, type(None))) else _blank(value)
            for name, value in entry.items()
        }
    return [_blank(value) for value in entry] if isinstance(entry, (list, tuple)) else MASK


def _is_value(before: Any, entry: Any) -> bool:
    """Return whether an entry of a command line is the value of a secret option before it."""
    return (
        isinstance(before, str)
        and isinstance(entry, str)
        and is_secret_option(before)
        and not entry.startswith("--")
    )


def _mask_argument(entry: Any, known: _Known) -> Any:
    if isinstance(entry, str):
        name, has_value, _ = entry.partition("=")
        if has_value and is_secret_option(name):
            return f"{name}={MASK}"
    return _mask(entry, known)
