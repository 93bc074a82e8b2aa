"""Read a study from its file: check names, options, rates, seeds and size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from molf.amounts import duration
from molf.data.sources import OPTIONS, places
from molf.data.stdin import STDIN
from molf.errors import InputError
from molf.job.settings.settings import TrainSettings
from molf.measure.meanings import is_lower_better, is_ranked, metric_names
from molf.paths import expanded
from molf.shown import suggestion
from molf.study.assigning.rule import read_rule
from molf.study.axes import cell_options, with_axes
from molf.study.choice import HARMS
from molf.study.definition import (
    GRID,
    KEEP_RECORDS,
    KEPT,
    PRUNERS,
    SAMPLERS,
    Cell,
    Choose,
    Method,
    Rates,
    Report,
    Study,
)
from molf.study.rates import check_equal_numbers, read_rates
from molf.study.values import (
    StudyFileError,
    TooManyError,
    integers,
    mapping,
    mappings,
    names,
    number,
    reject_unknown,
    text,
    truth,
    whole_number,
)

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]{0,63}")
FEWEST_SEEDS = 5  # of the second phase
MOST_TRIALS = 20_000
_CONTROLS = ("control_of", "share_of")
_STUDY = (
    *("study", "about", "output_dir", "storage", "cells", "methods", "axes", "choose", "report"),
    *("keep", "seconds", "heartbeat", "retries"),
)


class Options(Protocol):
    """Reads options of `molf train`, for a study."""

    def recipe(self, name: str) -> dict[str, Any]:
        """Return the options of a recipe: a file, or a shipped one by name.

        Raises:
            InputError: There is none, or it cannot be read.
        """

    def settings(self, options: Mapping[str, Any]) -> TrainSettings:
        """Return checked settings from options as in a recipe.

        Raises:
            InputError: An option is unknown, or its value is wrong.
        """


def read_study(path: Path, content: Mapping[str, Any], options: Options) -> Study:
    """Return the study that a file describes.

    Args:
        path: The file, for messages and for the study's default name.
        content: The content: mappings, lists, and scalars as text, integers or booleans.
        options: Reads recipes and options of `molf train`.

    Raises:
        InputError: A name is unknown, a value is wrong, the phases share a seed, methods have
            different numbers of rate trials, or the study is too large.
    """
    try:
        seconds = _seconds(content)
        study = _study(path, content, options)
        check_equal_numbers(study)
        _check_size(study)
    except TooManyError as error:
        time = duration(error.count * seconds)
        raise InputError(
            f"study {path}: {error.text}: at about {seconds:g} s each, one worker takes {time}. "
            f"{error.remedy}"
        ) from error
    except StudyFileError as error:
        raise InputError(f"study {path}: {error}") from error
    return study


def _study(path: Path, content: Mapping[str, Any], options: Options) -> Study:
    reject_unknown(content, _STUDY, "the study")
    name = _name(content.get("study", path.stem), "study")
    choose = _choose(mapping(content.get("choose", {}), "choose"))
    report = mapping(content.get("report", {}), "report")
    methods = [_method(entry, choose) for entry in mappings(content, "methods")]
    _check_once(methods, "methods")
    cells = [_cell(entry, methods, choose, options) for entry in mappings(content, "cells")]
    _check_once(cells, "cells")
    axes = mapping(content.get("axes", {}), "axes")
    cells, methods = with_axes(cells, methods, axes)
    _check_once(cells, "cells")
    _check_once(methods, "methods")
    for method in methods:
        _check_control(method, methods, cells)
        _check_rule(method, methods)
    for cell in cells:
        _check_sources(cell)
    keep = text(content.get("keep", KEEP_RECORDS), "keep")
    if keep not in KEPT:
        raise StudyFileError(f"Invalid keep={keep!r}. Must be one of {', '.join(KEPT)}.")
    where = content.get("output_dir")
    storage = content.get("storage")
    return Study(
        name=name,
        output_dir=Path("studies") / name if where is None else expanded(text(where, "output_dir")),
        storage=None if storage is None else text(storage, "storage"),
        cells=tuple(cells),
        methods=tuple(methods),
        choose=choose,
        report=_report(report, choose, methods),
        keep=keep,
        seconds=_seconds(content),
        heartbeat=whole_number(content.get("heartbeat", 20), "heartbeat"),
        retries=whole_number(content.get("retries", 3), "retries", least=0),
        about=text(content.get("about", ""), "about"),
    )


def _choose(content: Mapping[str, Any]) -> Choose:
    reject_unknown(content, ("sampler", "trials", "seeds", "prune"), "choose")
    sampler = text(content.get("sampler", GRID), "choose.sampler")
    if sampler not in SAMPLERS:
        raise StudyFileError(
            f"Invalid choose.sampler={sampler!r}. Must be one of {', '.join(SAMPLERS)}."
        )
    trials = content.get("trials")
    if (trials is None) != (sampler == GRID):
        raise StudyFileError(
            "choose.trials is the number of rate trials of the samplers random and tpe; a grid "
            "tries all its points. "
            + ("Leave it out." if sampler == GRID else f"Give it with sampler={sampler}.")
        )
    prune = content.get("prune")
    if prune is not None and prune not in PRUNERS:
        raise StudyFileError(
            f"Invalid choose.prune={prune!r}. Must be one of {', '.join(PRUNERS)}."
        )
    return Choose(
        sampler=sampler,
        trials=None if trials is None else whole_number(trials, "choose.trials"),
        seeds=integers(content.get("seeds", [1]), "choose.seeds"),
        prune=prune,
    )


def _report(content: Mapping[str, Any], choose: Choose, methods: Iterable[Method]) -> Report:
    reject_unknown(content, ("seeds", "baseline"), "report")
    seeds = integers(content.get("seeds", [11, 12, 13, 14, 15]), "report.seeds")
    if len(seeds) < FEWEST_SEEDS:
        raise StudyFileError(
            f"report.seeds has {len(seeds)} of the at least {FEWEST_SEEDS} seeds that an interval "
            "needs. Add seeds."
        )
    shared = sorted(set(seeds) & set(choose.seeds))
    if shared:
        raise StudyFileError(
            f"choose.seeds and report.seeds share {', '.join(map(str, shared))}: a rate that was "
            "chosen on a seed is too good there. Give other seeds to one of them."
        )
    known = [method.name for method in methods]
    baseline = names(content.get("baseline", known[0]), "report.baseline")
    for name in baseline:
        _check_known(name, known, "report.baseline", "methods")
    return Report(seeds, baseline)


def _method(content: Mapping[str, Any], choose: Choose) -> Method:
    name = _name(content.get("name"), "methods: name")
    where = f"methods, {name}"
    own = ("name", "rates", *_CONTROLS, "about")
    given = {key: value for key, value in content.items() if key not in own}
    controls = [key for key in _CONTROLS if content.get(key) is not None]
    if len(controls) > 1:
        raise StudyFileError(
            f"{where}: share_of makes a control of {content['share_of']}. Leave control_of out."
        )
    of = text(content[controls[0]], f"{where}, {controls[0]}") if controls else None
    if "share_of" in controls and "score" in given:
        raise StudyFileError(f"{where}: share_of makes the score random:Q. Leave score out.")
    if of is not None and "rates" in content:
        raise StudyFileError(
            f"{where}: {controls[0]} takes the rates of {of} too. Leave rates out."
        )
    if of is None and "rates" not in content:
        raise StudyFileError(
            f"{where}: rates are missing, such as rates: {{learning_rate: [1e-4, 3e-4]}}."
        )
    rule = None
    if isinstance(given.get("assignment"), Mapping):
        rule = read_rule(given.pop("assignment"), f"{where}, assignment")
        if given.get("method") != "hybrid":
            raise StudyFileError(f"{where}: assignment is for method=hybrid. Give that method.")
    return Method(
        name=name,
        options=given,
        rule=rule,
        rates=Rates() if of else read_rates(content["rates"], choose, f"{where}, rates"),
        control_of=of,
        share_of=of if "share_of" in controls else None,
        about=text(content.get("about", ""), f"{where}, about"),
    )


def _cell(
    content: Mapping[str, Any], methods: list[Method], choose: Choose, options: Options
) -> Cell:
    name = _name(content.get("name"), "cells: name")
    where = f"cells, {name}"
    own = ("name", "config", "metric", "minimize", "rates", "about")
    given = {key: value for key, value in content.items() if key not in own}
    recipe = {}
    if "config" in content:
        recipe = options.recipe(text(content["config"], f"{where}, config"))
    metric = text(content.get("metric"), f"{where}, metric")
    _check_known(metric, metric_names(), f"{where}, metric", "metrics")
    if metric in HARMS:
        raise StudyFileError(
            f"{where}, metric: {metric} is lowest without training, so it would choose the "
            f"lowest rate; the report has {', '.join(HARMS)} beside every metric. Give a metric of "
            "the task."
        )
    if not is_ranked(metric):
        raise StudyFileError(
            f"{where}, metric: neither high nor low values of {metric} are better, so it chooses "
            "no rate. Give another metric of the task."
        )
    minimize = truth(content.get("minimize", is_lower_better(metric)), f"{where}: Invalid minimize")
    known = [method.name for method in methods]
    rates = {}
    for method, entry in mapping(content.get("rates", {}), f"{where}, rates").items():
        _check_known(method, known, f"{where}, rates", "methods")
        rates[method] = read_rates(entry, choose, f"{where}, rates of {method}")
    return Cell(
        name=name,
        options=cell_options(recipe, given, where),
        metric=metric,
        minimize=minimize,
        rates=rates,
        about=text(content.get("about", ""), f"{where}, about"),
    )


def _check_sources(cell: Cell) -> None:
    for name in OPTIONS:
        given = cell.options.get(name)
        if given is not None and STDIN in places(str(given)):
            raise StudyFileError(
                f"cells, {cell.name}, {name}: {STDIN} is the standard input of one process, and a "
                "study reads its data many times. Give a file."
            )


def _check_control(method: Method, methods: Iterable[Method], cells: Iterable[Cell]) -> None:
    if method.control_of is None:
        return
    key = "control_of" if method.share_of is None else "share_of"
    where = f"methods, {method.name}, {key}"
    known = {other.name: other for other in methods}
    _check_known(method.control_of, known, where, "methods")
    model = known[method.control_of]
    if model.control_of is not None:
        raise StudyFileError(
            f"{where}: {model.name} is a control of {model.control_of} itself. Give a method that "
            "is no control."
        )
    if method.share_of is not None and model.options.get("method", "molf") != "molf":
        raise StudyFileError(
            f"{where}: {model.name} is no routed method with the expert full (method=molf)."
        )
    for cell in cells:
        if method.name in cell.rates:
            raise StudyFileError(
                f"cells, {cell.name}, rates of {method.name}: a control has the rates of its "
                f"method. Give those of {model.name}."
            )


def _check_rule(method: Method, methods: Iterable[Method]) -> None:
    if method.rule is None:
        return
    where = f"methods, {method.name}, assignment, of"
    known = {other.name: other for other in methods}
    _check_known(method.rule.of, known, where, "methods")
    model = known[method.rule.of]
    if model.options.get("method", "molf") != "molf":
        raise StudyFileError(
            f"{where}: {model.name} is no routed method with the expert full (method=molf)."
        )
    if model.share_of is not None:
        raise StudyFileError(
            f"{where}: the score of {model.name} follows from the share of {model.share_of}. Give "
            "a method with a score of its own."
        )


def _check_size(study: Study) -> None:
    if study.size > MOST_TRIALS:
        raise TooManyError(
            study.size,
            f"{study.size:,} trials",
            f"At most {MOST_TRIALS:,} are allowed. Try fewer rates or axes, or the samplers random "
            "and tpe with choose.trials.",
        )


def _seconds(content: Mapping[str, Any]) -> float:
    return number(content.get("seconds", 30), "seconds")


def _name(value: Any, where: str) -> str:
    if value is None:
        raise StudyFileError(f"{where}: a name is missing.")
    name = str(value)
    if not _NAME.fullmatch(name):
        raise StudyFileError(
            f"{where}: {name!r} is no name. Letters, digits and . _ + = - are allowed, at most 64."
        )
    return name


def _check_once(parts: Iterable[Cell | Method], where: str) -> None:
    seen: set[str] = set()
    for part in parts:
        # Folders of trials have these names, and some file systems ignore case.
        if part.name.lower() in seen:
            raise StudyFileError(f"{where}: the name {part.name} is given twice (case is ignored).")
        seen.add(part.name.lower())


def _check_known(name: str, known: Iterable[str], where: str, what: str) -> None:
    allowed = list(known)
    if name not in allowed:
        raise StudyFileError(
            f"{where}: {name!r} is none of the {what}: {', '.join(allowed)}."
            f"{suggestion(name, allowed)}"
        )
