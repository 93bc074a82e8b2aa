"""Quantised weights (bitsandbytes, torchao): recognised without importing either library."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

_BITSANDBYTES = {"Params4bit": "4-bit", "Int8Params": "8-bit"}


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds a quantised matrix and not its numbers.

    By class where there is one: bitsandbytes may store four-bit numbers in a floating-point dtype,
    and torchao's tensors show the dtype that they stand for.
    """
    return (
        type(weight).__name__ in _BITSANDBYTES
        or _is_torchao(weight)
        or not weight.is_floating_point()
    )


def kind_of(weight: Tensor) -> str:
    """What a quantised weight is, for messages: "bitsandbytes 4-bit", "torchao ...", a dtype."""
    if type(weight).__name__ in _BITSANDBYTES:
        return f"bitsandbytes {_BITSANDBYTES[type(weight).__name__]}"
    return f"torchao {type(weight).__name__}" if _is_torchao(weight) else str(weight.dtype)


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def require(library: str, purpose: str) -> None:
    """Make sure that an optional library is installed.

    Args:
        library: `"bitsandbytes"` or `"torchao"`; molf has an extra of the same name.
        purpose: What needs it, the subject of the message.

    Raises:
        ValueError: It is not; the message names the extra.
    """
    if find_spec(library) is None:
        raise ValueError(
            f"{purpose} needs {library}, which is not installed: pip install 'molf[{library}]'."
        )
