"""Print the oldest versions that pyproject.toml allows, as requirements for pip.

    python scripts/floors.py > floors.txt
    python scripts/floors.py --without-dependencies

Each `>=` of the dependencies, the extras and the build becomes `==`. torch has the version of
requirements-dev.lock, because older releases download gigabytes of CUDA each. triton is printed
separately, to be installed after the others without dependencies, because CUDA builds of torch pin
one release of it. wandb, mlflow and trackio, whose tests run with requirements-trackers.lock, are
left out. The dev tools, which users do not install, are unchanged.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_LOCK = "torch"
APART = "triton"
TESTED_APART = ("wandb", "mlflow", "trackio")

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:>=(?P<floor>[0-9.]+))?(?P<marker>\s*;.*)?\Z"
)


def floors(root: Path = ROOT) -> dict[str, str]:
    """Return requirements that pin each user dependency to its floor, by lower-case name.

    Args:
        root: The folder with pyproject.toml and requirements-dev.lock.

    Raises:
        ValueError: A requirement is not of the form NAME>=VERSION, or has two different floors.
    """
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    found: dict[str, str] = {}
    for requirement in (
        *pyproject["build-system"]["requires"],
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ):
        match = _REQUIREMENT.match(requirement)
        if match is None or match["floor"] is None:
            raise ValueError(f"{requirement!r} is not of the form NAME>=VERSION.")
        name = match["name"].lower()
        pinned = f"{match['name']}=={match['floor']}{match['marker'] or ''}"
        if found.setdefault(name, pinned) != pinned:
            raise ValueError(f"{match['name']} has two floors: {found[name]}, {pinned}.")
    for name in TESTED_APART:
        del found[name]
    lock = (root / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    found[FROM_LOCK] = next(line for line in lock if line.startswith(f"{FROM_LOCK}=="))
    return found


def tools(root: Path = ROOT) -> Iterator[str]:
    """Return the requirements of the dev group that are in no extra."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    known = floors(root)
    for requirement in pyproject["dependency-groups"]["dev"]:
        match = _REQUIREMENT.match(requirement)
        if match is None or match["name"].lower() not in known:
            yield requirement


def main() -> None:
    """Print the requirements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--without-dependencies", action="store_true", help=f"{APART} alone")
    alone = parser.parse_args().without_dependencies
    pinned = floors()
    apart = pinned.pop(APART)
    lines = [apart] if alone else [*pinned.values(), *tools()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
