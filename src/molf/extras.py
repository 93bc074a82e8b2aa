"""Extras of molf (`pip install 'molf[train]'`), and messages for packages that are missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

_IMPORT_NAMES = {"pyyaml": "yaml"}  # where the module is not called like its distribution
_REQUIREMENT = re.compile(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]")


def extra_of(module: str) -> str | None:
    """Return the extra that installs a module, from molf's metadata; None if there is none."""
    try:
        requirements = requires("molf") or ()
    except PackageNotFoundError:  # molf is not installed, but on the path
        return None
    for match in map(_REQUIREMENT.match, requirements):
        if match is not None:
            name = match[1].lower()
            if _IMPORT_NAMES.get(name, name).replace("-", "_") == module.partition(".")[0]:
                return match[2]
    return None


def how_to_install(module: str) -> str:
    """Return the command that installs a module."""
    extra = extra_of(module)
    return f"pip install {module}" if extra is None else f"pip install 'molf[{extra}]'"


def missing_package(what: str, error: ModuleNotFoundError) -> str | None:
    """Return a line for a package of an extra that is missing; None for all other modules.

    Args:
        what: The command that needs it.
        error: The error of the import.
    """
    module = (error.name or "").partition(".")[0]
    if not module or extra_of(module) is None:
        return None
    return f"{what} needs {module}, which is not installed: {how_to_install(module)}."
