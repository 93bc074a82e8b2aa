"""Read study files, recipes and options of `molf train` for studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError

from molf.cli.recipes.apply import read_recipe, read_recipe_text
from molf.cli.recipes.shipped import find_recipe
from molf.cli.recipes.text import RecipeError, read_nested
from molf.cli.recipes.validation import parse_options
from molf.errors import InputError
from molf.job.settings.settings import TrainSettings
from molf.masking import learn
from molf.paths import check_path, expanded
from molf.study.definition import Cell, Method, Study
from molf.study.plan import TrialMaker
from molf.study.reading import read_study

_SHIPPED = Path(__file__).resolve().parents[1] / "studies"


class CliOptions:
    """Reads options as the command line does.

    Args:
        folder: The folder of the study file, where its recipes are searched first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recipe(self, name: str) -> dict[str, Any]:
        """Return the options of a recipe: a file, or a shipped one by name."""
        beside = self._folder / name
        path = beside if beside.is_file() else find_recipe(name)
        return read_recipe(path, read_recipe_text(path))

    def settings(self, options: Mapping[str, Any]) -> TrainSettings:
        """Return checked settings from options as in a recipe."""
        try:
            found = parse_options(Path("study"), "train", options).get("settings", TrainSettings())
        except CycloptsError as error:
            message = " ".join(str(error).replace(" from study", "").split())
            raise InputError(message) from error
        if not isinstance(found, TrainSettings):
            raise TypeError(f"no settings: {found!r}")
        return found


def study_names() -> list[str]:
    """Return the names of the shipped studies in alphabetical order."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def find_study(given: Path) -> Path:
    """Return the file of a study: the given path, else the shipped study of that name.

    Raises:
        InputError: Neither exists.
    """
    path = expanded(given)
    check_path(path, "study")
    shipped = _SHIPPED / f"{str(given).removesuffix('.yaml')}.yaml"
    if path.exists() or (len(given.parts) == 1 and shipped.is_file()):
        return path if path.exists() else shipped
    raise InputError(
        f"study {given}: there is no such file, and no shipped study of that name "
        f"({', '.join(study_names())})."
    )


def open_study(path: Path) -> tuple[Study, TrialMaker]:
    """Read a study file; return the study, and a function that makes its trials.

    Raises:
        InputError: The file cannot be read, or is wrong.
    """
    path = find_study(path)
    try:
        content = read_nested(read_recipe_text(path, "study"))
    except RecipeError as error:
        raise InputError(f"study {path} {error}") from error
    learn(content)
    options = CliOptions(path.absolute().parent)
    study = read_study(path, content, options)
    made: dict[tuple[str, str, str | None], TrainSettings] = {}

    def settings(cell: Cell, method: Method, score: str | None) -> TrainSettings:
        place = (cell.name, method.name, score)
        if place not in made:
            given = {**cell.options, **method.options}
            if score is not None:
                given["score"] = score
            if method.rule is not None:
                given["assignment"] = str(method.rule)  # each trial gets the file that it makes
            try:
                made[place] = options.settings(given)
            except InputError as error:
                raise InputError(f"cell {cell.name}, method {method.name}: {error}") from error
        return made[place]

    return study, TrialMaker(study, settings)
