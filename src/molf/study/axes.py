"""Options that belong to cells, options that belong to methods, and axes over both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_type_hints

from molf.data.sources import with_joined_sources
from molf.job.settings.resolved import without_effect
from molf.job.settings.settings import METHOD, TrainSettings
from molf.shown import option_text
from molf.study.definition import EVAL_PART, RATES, Cell, Method
from molf.study.values import StudyFileError, TooManyError, reject_unknown

# Set by the study for each trial.
_OWN = ("seed", "output_dir", "overwrite", "dry_run", EVAL_PART, "fallback_dir", "resume")
_MOST_VARIANTS = 1000
# Layers have other names in other models.
_OF_MODELS = ("target_modules", "exclude_modules")


@cache
def method_options() -> frozenset[str]:
    """Return the options of `molf train` that belong to a method."""
    hints = get_type_hints(TrainSettings, include_extras=True)
    found = {
        name
        for name, hint in hints.items()
        for entry in getattr(hint, "__metadata__", ())
        if METHOD in (getattr(entry, "group", None) or ())
    }
    return frozenset((found | {"lora_weight_decay"}) - set(_OF_MODELS))


def cell_options(recipe: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options of a cell: a recipe's without its method and rates, then its own.

    Raises:
        StudyFileError: An option of its own belongs to the methods, the rates or the study.
    """
    for name in given:
        if name in RATES:
            raise StudyFileError(
                f"{where}: {name} is given by `rates` alone, in the methods or in the cell."
            )
        if name in _OWN:
            raise StudyFileError(f"{where}: {name} is set by the study.")
        if name in method_options():
            raise StudyFileError(f"{where}: {name} belongs to methods.")
    apart = {*method_options(), *RATES, *_OWN}
    return with_joined_sources({**{k: v for k, v in recipe.items() if k not in apart}, **given})


def check_method_options(method: Method) -> None:
    """Check that all options of a method belong to methods.

    Raises:
        StudyFileError: One belongs to cells, to `rates` or to the study.
    """
    allowed = sorted({*method_options(), *_OF_MODELS})
    of_cells = {option.name for option in fields(TrainSettings)}.difference(allowed)
    where = f"methods, {method.name}"
    for name in method.options:
        if name in RATES:
            raise StudyFileError(f"{where}: {name} is given by `rates` alone.")
        if name in _OWN:
            raise StudyFileError(f"{where}: {name} is set by the study.")
        if name in of_cells:
            raise StudyFileError(
                f"{where}: {name} belongs to cells. A method may set {', '.join(allowed)}."
            )
    reject_unknown(method.options, allowed, where)


def with_axes(
    cells: Sequence[Cell], methods: Sequence[Method], axes: Mapping[str, Any]
) -> tuple[list[Cell], list[Method]]:
    """Return one cell or method for each combination of the axes' values.

    Options of methods make methods, and all other options make cells. A method without effect of
    an option has no variants of it.

    Args:
        cells: The cells.
        methods: The methods.
        axes: A list of values by name of an option.

    Raises:
        StudyFileError: An axis has no values, or is set elsewhere.
    """
    for method in methods:
        check_method_options(method)
    _check_axes(axes)
    of_methods = {name: axes[name] for name in axes if name in method_options()}
    of_cells = _combinations({name: axes[name] for name in axes if name not in of_methods})
    own = {
        method.name: [name for name in of_methods if name not in _unused(method)]
        for method in methods
    }
    variants = [(method.name, _variants(method, own, of_methods)) for method in methods]
    new_cells = [
        replace(
            cell,
            name=cell.name + suffix,
            options={**cell.options, **values},
            rates={
                one.name: cell.rates[name]
                for name, made in variants
                if name in cell.rates
                for one in made
            },
        )
        for cell in cells
        for suffix, values in of_cells
    ]
    return new_cells, [one for _, made in variants for one in made]


def _check_axes(axes: Mapping[str, Any]) -> None:
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise StudyFileError(f"axes, {name}: give a list of values.")
        if name in RATES or name in _OWN:
            raise StudyFileError(
                f"axes, {name}: rates are given with the methods, seeds with the phases."
            )


def _variants(
    method: Method, own: Mapping[str, Sequence[str]], axes: Mapping[str, Sequence[Any]]
) -> list[Method]:
    """Return a method for each combination of the axes' values.

    Args:
        method: The method.
        own: The axes that each method uses, by its name.
        axes: The values of the axes of methods.
    """
    made = []
    for suffix, values in _combinations({name: axes[name] for name in own[method.name]}):
        control_of, rule = _variant(method.control_of, own, values), method.rule
        if rule is not None:
            rule = replace(rule, of=_variant(rule.of, own, values) or rule.of)
        made.append(
            replace(
                method,
                name=method.name + suffix,
                options={**method.options, **values},
                control_of=control_of,
                share_of=None if method.share_of is None else control_of,
                rule=rule,
            )
        )
    return made


def _variant(
    name: str | None, own: Mapping[str, Sequence[str]], values: Mapping[str, Any]
) -> str | None:
    """Return the variant of a method with the same values, of the options that it uses."""
    if name is None:
        return None
    return name + _suffix({n: values[n] for n in own.get(name, ()) if n in values})


def _combinations(axes: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    count = math.prod(map(len, axes.values()))
    if count > _MOST_VARIANTS:
        raise TooManyError(
            count,
            f"axes: {count:,} combinations, each of one or more trials",
            f"At most {_MOST_VARIANTS:,} are allowed. Give fewer values.",
        )
    combined = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        combined.append((_suffix(chosen), chosen))
    return combined


def _suffix(values: Mapping[str, Any]) -> str:
    return "".join(f"+{name}={_word(value)}" for name, value in values.items())


def _unused(method: Method) -> tuple[str, ...]:
    return without_effect(str(method.options.get("method", "molf")))


def _word(value: Any) -> str:
    return option_text(value).rstrip("/").rsplit("/", 1)[-1].replace(",", "_").replace(":", "_")
