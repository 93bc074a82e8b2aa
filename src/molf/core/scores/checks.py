"""Checks of a registered score: names, signatures, and one trial on small tensors."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from molf.core.scores.score import Block, Expert, Part, Score, ScoreTerm
from molf.core.scores.terms import SHIPPED_TERMS

_NAME = re.compile("[a-z][a-z0-9-]*")
_KEY = re.compile("[a-z][a-z0-9_-]*")  # of terms and kept numbers
_SHAPES = {"weight": (3, 4), "bias": (3,), "lora_A": (2, 4), "lora_B": (3, 2)}


def check_score(score: Score, taken: tuple[str, ...]) -> None:
    """Check a score before it is registered.

    Its terms are computed on small random tensors and its function on their sums, so that errors
    appear here and not in a training.

    Args:
        score: The score.
        taken: Names that it must not have.

    Raises:
        TypeError: A part has a wrong type.
        ValueError: A name is not allowed, or the trial fails.
    """
    if not isinstance(score, Score):
        raise TypeError(f"Invalid score of type {type(score).__name__}. Must be molf.Score.")
    if not isinstance(score.name, str) or not _NAME.fullmatch(score.name) or score.name in taken:
        raise ValueError(
            f"Invalid name {score.name!r} of a score. Must be lower-case letters, digits and "
            f"hyphens, and none of {', '.join(taken)}."
        )
    where = f"score {score.name!r}"
    _check_terms(score, where)
    _check_kept(score, where)
    if not _takes_one(score.value):
        raise TypeError(f"Invalid value of {where}. Must be a function of one molf Expert.")
    sums = {name: _sums(score, shape, where) for name, shape in _SHAPES.items()}
    for name, rank, parts in (("full", None, ("weight", "bias")), ("lora0_r2", 2, _SHAPES)):
        own = [part for part in parts if rank is None or part.startswith("lora")]
        expert = Expert(
            name=name,
            rank=rank,
            lr=1e-3,
            scaling=1.0 if rank is None else 2.0,
            shape=(3, 4),
            parts=tuple(Part(part, math.prod(_SHAPES[part]), sums[part]) for part in own),
            kept=dict(score.kept),
        )
        try:
            value_of(score, expert)
        except ScoreError as error:
            raise ValueError(f"Invalid value of {where}, tried on small tensors: {error}") from (
                error.__cause__
            )


class ScoreError(RuntimeError):
    """The function of a score failed, or returned no number."""


def value_of(score: Score, expert: Expert) -> float:
    """Return the score of an expert.

    Raises:
        ScoreError: The function raised an error, returned no number, or kept a number that
            `Score.kept` does not declare. The value may be NaN.
    """
    try:
        value: Any = score.value(expert)
    except Exception as error:
        raise ScoreError(
            f"its function raised {type(error).__name__}: {error}. {_declared(score)}"
        ) from error
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ScoreError(f"its function returned {type(value).__name__}, not a float.")
    if expert.kept.keys() != score.kept.keys():
        own = ", ".join(expert.kept) or "nothing"
        raise ScoreError(f"its function keeps {own}. {_declared(score)}")
    for name, number in expert.kept.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise ScoreError(f"its function keeps {name} as {type(number).__name__}, not a float.")
    return float(value)


def _declared(score: Score) -> str:
    terms = ", ".join(term.name for term in score.terms)
    return f"Declared terms: {terms}; kept: {', '.join(score.kept) or 'nothing'}."


def _check_terms(score: Score, where: str) -> None:
    terms = score.terms
    if not isinstance(terms, tuple) or not all(isinstance(term, ScoreTerm) for term in terms):
        raise TypeError(f"Invalid terms of {where}. Must be a tuple of molf.ScoreTerm.")
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Invalid terms {names} of {where}. Must be one or more, with different names."
        )
    for term in terms:
        if not isinstance(term.name, str) or not _KEY.fullmatch(term.name):
            raise ValueError(
                f"Invalid name {term.name!r} of a term of {where}. Must be lower-case letters, "
                "digits, hyphens and underscores."
            )
        # Executors recognise shipped terms by their names.
        if term != SHIPPED_TERMS.get(term.name, term):
            raise ValueError(
                f"Invalid name {term.name!r} of a term of {where}. A shipped term has it: give "
                "that one (molf.core.scores.terms), or another name."
            )
        if not _takes_one(term.factors):
            raise TypeError(
                f"Invalid factors of the term {term.name!r} of {where}. Must be a function of one "
                "block."
            )


def _check_kept(score: Score, where: str) -> None:
    kept = score.kept
    if not isinstance(kept, Mapping):
        raise TypeError(f"Invalid kept={kept!r} of {where}. Must be initial numbers by name.")
    for name, number in kept.items():
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        if not isinstance(name, str) or not _KEY.fullmatch(name) or not is_number:
            raise ValueError(
                f"Invalid kept={dict(kept)!r} of {where}. Must be initial numbers by names of "
                "lower-case letters, digits, hyphens and underscores."
            )


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(object())
    except TypeError:  # not callable, or another number of arguments
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _sums(score: Score, shape: tuple[int, ...], where: str) -> dict[str, float]:
    """Return the sums of all terms over random tensors of a shape."""
    found = {}
    for term in score.terms:
        generator = torch.Generator().manual_seed(0)
        grad, exp_avg, root = (torch.randn(shape, generator=generator) for _ in range(3))
        block = Block(grad, exp_avg, root.square())
        tensors = (block.grad, block.exp_avg, block.exp_avg_sq, block.direction)
        before = [one.clone() for one in tensors]
        about = f"Invalid factors of the term {term.name!r} of {where}"
        try:
            factors: Any = term.factors(block)
        except Exception as error:
            raise ValueError(
                f"{about}: tried on small tensors they raised {type(error).__name__}: {error}."
            ) from error
        if (
            not isinstance(factors, tuple)
            or len(factors) not in (1, 2)
            or not all(isinstance(one, Tensor) and one.shape == grad.shape for one in factors)
        ):
            raise ValueError(
                f"{about}: they must return a tuple of one or two tensors in the shape of the "
                f"block, not {_described(factors)}."
            )
        if not all(map(torch.equal, before, tensors)):
            raise ValueError(
                f"{about}: they changed the gradient, a moment or the direction in place."
            )
        first, second = factors if len(factors) == 2 else (factors[0], torch.ones(shape))
        found[term.name] = float((first * second).sum())
    return found


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return type(value).__name__
