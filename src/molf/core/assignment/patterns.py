"""Assignments from patterns written by hand: `full: [k_proj]`, `lora: {r: 32, modules: [q_proj]}`.

A pattern is a run of whole dotted components: `mlp.up_proj` names every layer whose name has these
two components in a row. Inside a component `*` stands for any text without a dot, and `[0-3]` or
`[0,2,8-11]` for one of these numbers. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from molf.core.assignment.assigned import (
    FROZEN,
    FULL,
    KINDS,
    LORA,
    AssignedLayer,
    Treatment,
    check_rank,
    default_alpha,
)
from molf.shown import counted, listed

_MOST_NUMBERS = 10_000  # of a range
_KEYS = (*KINDS, "default", "freeze_rest", "use_rslora")
_LORA_KEYS = ("r", "alpha", "modules")
_PART = re.compile(r"\*|\[([^\[\]]*)\]|[^*\[\]]+")


@dataclass(frozen=True)
class Rule:
    """Patterns with one treatment; rules are in the order of precedence.

    Attributes:
        treatment: The training of the layers.
        patterns: The patterns.
    """

    treatment: Treatment
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Patterns:
    """The content of an assignment written by hand.

    Attributes:
        rules: `frozen`, `full`, then the entries of `lora`.
        default: Treatment of layers that no pattern names; None if it was not given.
        freeze_rest: Whether norms, embeddings and biases are frozen.
        use_rslora: Whether alpha is for rank-stabilised scaling.
    """

    rules: tuple[Rule, ...]
    default: Treatment | None
    freeze_rest: bool
    use_rslora: bool

    @classmethod
    def of(cls, given: Any) -> Patterns:
        """Check and convert a mapping with the keys full, lora, frozen, default, ...

        Raises:
            ValueError: A key or value is not allowed; the message has the allowed ones.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"Invalid patterns {given!r}. Must be a mapping of {_listed(_KEYS)}.")
        _check_keys("patterns", given, _KEYS)
        flags = {name: given.get(name, False) for name in ("freeze_rest", "use_rslora")}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"Invalid {name}={value!r}. Must be true or false.")
        entries = given.get(LORA, [])
        entries = entries if isinstance(entries, (list, tuple)) else [entries]
        rules = [
            Rule(Treatment(kind), _patterns(kind, given[kind]))
            for kind in (FROZEN, FULL)
            if kind in given
        ]
        lora = []
        for entry in entries:
            treatment = _lora(entry, use_rslora=flags["use_rslora"])
            lora.append(Rule(treatment, _patterns("lora modules", entry.get("modules"))))
        default = given.get("default")
        if default is not None:
            default = _default(default, lora, use_rslora=flags["use_rslora"])
        if not rules and not lora and default is None:
            raise ValueError(f"No pattern is given. Give one or more of {_listed(KINDS)}.")
        return cls((*rules, *lora), default, **flags)


class Named(NamedTuple):
    """The result of `name_layers`.

    Attributes:
        layers: The layers with their treatment, in the model's order.
        frozen_rest: Names of other parameters that patterns of `frozen` name.
        unnamed: Names of layers that no pattern names.
    """

    layers: tuple[AssignedLayer, ...]
    frozen_rest: tuple[str, ...]
    unnamed: tuple[str, ...]


def name_layers(
    patterns: Patterns,
    layers: Mapping[str, tuple[int, int]],
    heads: Mapping[str, tuple[int, int]],
    rest: Sequence[str],
) -> Named:
    """Give every layer its treatment.

    Args:
        patterns: The patterns.
        layers: (out, in) by name.
        heads: The same of the head, which is a layer only if a pattern of `full` or `lora` names
            it; else it belongs to the rest.
        rest: Names of all other parameters, which a pattern of `frozen` may name.

    Raises:
        ValueError: A pattern matches nothing, or only layers that other patterns took; or a rank
            exceeds a layer's smaller side.
    """
    every = {**layers, **heads}
    owner: dict[str, Rule] = {}
    frozen_rest: dict[str, None] = {}
    matched: dict[tuple[int, str], list[str]] = {}
    for number, rule in enumerate(patterns.rules):
        for pattern in rule.patterns:
            found = matched[number, pattern] = matching(pattern, every)
            for name in found:
                owner.setdefault(name, rule)
            others: list[str] = []
            if rule.treatment.train == FROZEN:
                others = matching(pattern, rest)
                frozen_rest |= dict.fromkeys(others)
            if not found and not others:
                raise ValueError(_matches_nothing(rule, pattern, every, rest))
    for (number, pattern), found in matched.items():
        rule = patterns.rules[number]
        if found and not any(owner[name] is rule for name in found):
            takers = dict.fromkeys(owner[name].treatment.train for name in found)
            raise ValueError(
                f"Invalid {rule.treatment.train} pattern {pattern!r}: other patterns "
                f"({_listed(takers)}) took all its {counted(len(found), 'layer')} "
                f"({listed(found, 2)}). frozen wins over full, full over lora, an earlier entry of "
                "lora over a later one."
            )
    default = patterns.default or Treatment(FROZEN)
    treatments = {name: owner[name].treatment if name in owner else default for name in layers}
    for name in heads:
        if name in owner and owner[name].treatment.train != FROZEN:
            treatments[name] = owner[name].treatment
    return Named(
        tuple(
            AssignedLayer(name=name, shape=every[name], **one._asdict())
            for name, one in treatments.items()
        ),
        tuple(frozen_rest),
        tuple(name for name in layers if name not in owner),
    )


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names with a run of components that a pattern matches."""
    expression = re.compile(_expression(pattern))
    return [name for name in names if expression.search(name)]


def _expression(pattern: str) -> str:
    """Return a regular expression for a pattern.

    Raises:
        ValueError: The pattern is empty, has an empty component, or brackets without numbers.
    """
    if not isinstance(pattern, str) or not all(pattern.split(".")):
        raise ValueError(
            f"Invalid pattern {pattern!r}. Must be whole components of names, such as k_proj, "
            "mlp.up_proj or model.layers.[0-3]."
        )
    expression = ""
    position = 0
    for part in _PART.finditer(pattern):
        if part.start() != position:
            break
        position = part.end()
        if part[0] == "*":
            expression += "[^.]*"
        elif part[1] is not None:
            expression += f"(?:{'|'.join(map(str, _numbers(part[1], pattern)))})"
        else:
            expression += re.escape(part[0])
    if position != len(pattern):
        raise ValueError(f"Invalid pattern {pattern!r}: a bracket has no partner.")
    return rf"(?:^|\.){expression}(?:\.|$)"


def _numbers(text: str, pattern: str) -> list[int]:
    """Return the numbers of `0-3` or `0,2,8-11`."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last - first >= _MOST_NUMBERS:
            raise ValueError(
                f"Invalid pattern {pattern!r}: [{text}] must hold numbers and ranges, such as "
                "[0-3] or [0,2,8-11]."
            )
        numbers += range(first, last + 1)
    return numbers


def _check_keys(what: str, given: Mapping[Any, Any], allowed: Sequence[str]) -> None:
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise ValueError(f"Invalid {what}: unknown {unknown[0]!r}. Must be {_listed(allowed)}.")


def _patterns(own: str, given: Any) -> tuple[str, ...]:
    """Return a list of patterns, also one alone; each is checked."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise ValueError(
            f"Invalid {own}={given!r}. Must be one or more patterns, such as [k_proj]."
        )
    for pattern in patterns:
        _expression(pattern)
    return tuple(patterns)


def _lora(entry: Any, *, use_rslora: bool, keys: Sequence[str] = _LORA_KEYS) -> Treatment:
    """Return the treatment of an entry of `lora`."""
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"Invalid lora={entry!r}. Must be a mapping of {_listed(keys)}, or a list of these."
        )
    _check_keys("lora", entry, keys)
    if "r" not in entry:
        raise ValueError(f"Invalid lora={dict(entry)!r}: it has no rank. Give r.")
    check_rank(entry["r"], entry.get("alpha", 1), "lora", is_lora=True)
    alpha = entry.get("alpha") or default_alpha(entry["r"], use_rslora=use_rslora)
    return Treatment(LORA, entry["r"], float(alpha))


def _default(given: Any, lora: Sequence[Rule], *, use_rslora: bool) -> Treatment:
    if given in (FULL, FROZEN):
        return Treatment(given)
    if isinstance(given, Mapping):
        return _lora(given, use_rslora=use_rslora, keys=("r", "alpha"))
    if given == LORA and len(lora) == 1:
        return lora[0].treatment
    raise ValueError(
        f"Invalid default={given!r}. Must be full, frozen, a mapping of r and alpha, or lora where "
        "there is one entry of lora."
    )


def _matches_nothing(rule: Rule, pattern: str, layers: Iterable[str], rest: Sequence[str]) -> str:
    train = rule.treatment.train
    message = f"Invalid {train} pattern {pattern!r}: it matches no linear layer. "
    if train != FROZEN and (others := matching(pattern, rest)):
        return message + (
            f"{others[0]} is no linear layer: norms, embeddings, biases and other parameters train "
            "unless freeze_rest is set or a pattern of frozen names them."
        )
    endings = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    return message + (
        f"Layers end in {', '.join(endings)}. A pattern is a run of whole components of a name."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
