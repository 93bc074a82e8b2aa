"""Keeping credentials out of what a run writes down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MASK = "***"

_NAME = r"[\w.-]*(?:token|secret|password|passwd|api_?key|credential|signature)"
_OPTION = re.compile(rf"--{_NAME}", re.IGNORECASE)
_IN_TEXT = (
    re.compile(rf"(--{_NAME}=).+", re.IGNORECASE),  # an option with its value
    re.compile(rf"([?&]{_NAME}=)[^&\s]+", re.IGNORECASE),  # a signed address
    re.compile(r"(\w://)[^/@\s]+(?=@)"),  # name and password in an address
    re.compile(r"\b(hf_)[A-Za-z0-9]{16,}"),  # a token of the Hugging Face Hub
)


def mask(value: Any) -> Any:
    """A value of JSON with what is secret in its texts masked."""
    if isinstance(value, dict):
        return {
            name: MASK if entry and _OPTION.fullmatch(f"--{name}") else mask(entry)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mask(entry) for entry in value]
    if isinstance(value, str):
        for pattern in _IN_TEXT:
            value = pattern.sub(rf"\g<1>{MASK}", value)
    return value


def mask_command(arguments: Sequence[str]) -> list[str]:
    """A command line in which the values of secret options are masked."""
    masked: list[str] = []
    for argument in arguments:
        is_value = masked and _OPTION.fullmatch(masked[-1]) and not argument.startswith("--")
        masked.append(MASK if is_value else mask(argument))
    return masked
