"""Registers faults and plants one: functions of molf.core are replaced in the running process."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

FAULTS: list[Fault] = []


class Fault(NamedTuple):
    """A fault to plant.

    Attributes:
        name: A sentence about the behaviour that is wrong.
        tests: Test files, or node ids, under tests/core that must fail, quickest first.
        targets: Functions, methods (`Class.method`) or constants of molf.core, by name. Not by
            file, because files move; `Neighbour:name` is the one in the module of `Neighbour`.
        replace: Takes the targets; returns the replacement, or a tuple of one for each.
    """

    name: str
    tests: str
    targets: tuple[str, ...]
    replace: Callable[..., Any]


def fault(name: str, tests: str, *targets: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the `replace` of a fault."""

    def register(replace: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(name, tests, targets, replace))
        return replace

    return register


class TargetError(Exception):
    """No function of molf.core has a target's name, or several have."""


def plant(one: Fault) -> None:
    """Replace the targets of a fault for the rest of this process.

    Raises:
        TargetError: A target does not exist, or is ambiguous.
    """
    found = [find(target) for target in one.targets]
    made = one.replace(*(value for _, _, value in found))
    replacements = made if len(found) > 1 else (made,)
    for (owner, name, old), new in zip(found, replacements, strict=True):
        setattr(owner, name, new)
        if not isinstance(owner, ModuleType) or isinstance(old, (int, float)):
            continue
        for module in _modules("molf"):  # that have imported it
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


def find(target: str) -> tuple[Any, str, Any]:
    """Return the module or class that defines a target, its name there, and its value.

    Raises:
        TargetError: There is none, or there are several.
    """
    _import_core()
    neighbour, _, path = target.rpartition(":")
    first, _, method = path.partition(".")
    owners: list[Any] = [
        module
        for module in _modules("molf.core")
        if _defines(module, first) and (not neighbour or _defines(module, neighbour))
    ]
    if method:
        owners = [vars(module)[first] for module in owners]
        owners = [one for one in owners if isinstance(one, type) and method in vars(one)]
    if len(owners) != 1:
        raise TargetError(f"{target!r} is defined {len(owners)} times: {owners}")
    name = method or first
    return owners[0], name, vars(owners[0])[name]


def _defines(module: ModuleType, name: str) -> bool:
    """Whether a module defines a name, rather than importing it; constants have no module."""
    value = vars(module).get(name)
    is_local = getattr(value, "__module__", module.__name__) == module.__name__
    return value is not None and is_local and not isinstance(value, ModuleType)


def _import_core() -> None:
    package = importlib.import_module("molf.core")
    for module in pkgutil.walk_packages(package.__path__, "molf.core."):
        with suppress(ImportError):  # of optional libraries
            importlib.import_module(module.name)


def _modules(package: str) -> list[ModuleType]:
    loaded = [(name, module) for name, module in sys.modules.items() if module is not None]
    return [module for name, module in loaded if f"{name}.".startswith(f"{package}.")]
