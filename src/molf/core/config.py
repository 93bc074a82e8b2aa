"""Settings of the method; checked on construction. Imports the standard library only."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from molf.core.scores.registry import Routing, routing
from molf.inputs import is_integer, is_number


@dataclass(frozen=True, kw_only=True)
class MoLFConfig:
    """Settings of the method.

    Attributes:
        ranks: Rank of each LoRA expert; an int means one expert.
        alpha: LoRA alpha, one number for all experts or one per rank.
        use_rslora: Scale by `alpha / sqrt(rank)` (rank-stabilised) instead of `alpha / rank`.
        lora_dropout: Dropout before the factors, in [0, 1). Above 0 it needs the adapter form
            (`molf.with_adapter`).
        score: `"epd"` (expected preconditioned descent, Eq. 10), `"pfn"` (preconditioned Frobenius
            norm, Eq. 11), another score (`molf.core.scores`, docs/scores.md) or a control:
            `"random"` (seeded), `"full"` (the full expert always wins), `"lora"` (the best LoRA
            expert by EPD always wins), `"random:Q"` (`full` wins with probability Q),
            `"shuffled:SCORE"` (in each step `full` wins in as many layers as by SCORE, drawn at
            random). `"share:Q:SCORE"`: `full` wins in the share Q of layers where it leads most.
        top_k: Number of experts of a layer that are updated in each step.
        target_modules: `"all-linear"`, a list of name endings, or a regular expression for the
            whole module name, as in PEFT.
        exclude_modules: Name endings or a regular expression; these modules are not routed.
        freeze_base: Train LoRA experts only, as slices of a PEFT adapter (MoLF-Efficient).
        freeze_rest: Freeze parameters that are not routed (norms, embeddings, biases). None: train
            them with `freeze_base=False`, freeze them with `freeze_base=True`.
        seed: Seed of the initial A factors and of scores that draw.

    Raises:
        ValueError: A value is not allowed; the message has the value and the allowed ones.

    Warns:
        UserWarning: Every expert is updated in every step: nothing is routed.
    """

    ranks: tuple[int, ...] = (128,)
    alpha: float | tuple[float, ...] = 32.0
    use_rslora: bool = True
    lora_dropout: float = 0.0
    score: str = "epd"
    top_k: int = 1
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ("lm_head",)
    freeze_base: bool = False
    freeze_rest: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Convert sequences to tuples and check every value."""
        self._set("ranks", _as_tuple(self.ranks))
        if isinstance(self.alpha, Iterable):
            self._set("alpha", _as_tuple(self.alpha))
        for name in ("target_modules", "exclude_modules"):
            self._set(name, _as_patterns(name, getattr(self, name)))
        for name, allowed in (
            ("use_rslora", (True, False)),
            ("freeze_base", (True, False)),
            ("freeze_rest", (True, False, None)),
        ):
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(
                    f"Invalid {name}={getattr(self, name)!r}. Must be one of "
                    f"{', '.join(map(str, allowed))}."
                )

        if not self.ranks or not all(is_integer(r) and r >= 1 for r in self.ranks):
            raise ValueError(
                f"Invalid ranks={list(self.ranks)}. Must be one or more integers, each at least 1."
            )
        if isinstance(self.alpha, tuple) and len(self.alpha) != len(self.ranks):
            raise ValueError(
                f"Invalid alpha={list(self.alpha)}. Must be one number, or one per rank "
                f"({len(self.ranks)} ranks)."
            )
        if not all(is_number(a) and a > 0 for a in self.alphas):
            raise ValueError(f"Invalid alpha={self.alpha}. Must be positive and finite.")
        if not (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"Invalid lora_dropout={self.lora_dropout}. Must be in [0, 1).")
        routing(self.score)
        if not is_integer(self.seed):
            raise ValueError(f"Invalid seed={self.seed!r}. Must be an integer.")
        if not self.target_modules:
            raise ValueError(
                "Invalid target_modules: empty. Must be 'all-linear', a list of name endings, or "
                "a regular expression."
            )
        self._check_experts()

    def _check_experts(self) -> None:
        """Check the settings that depend on which experts there are."""
        if self.freeze_base and self.routing.rule.needs_full:
            raise ValueError(
                f"Invalid score={self.score!r} with freeze_base=True: there is no full expert. "
                "Use freeze_base=False or another score."
            )
        eligible = len(self.eligible)
        most = self.routing.rule.most_winners(self.experts, self.lora_experts)
        if not is_integer(self.top_k) or not 1 <= self.top_k <= most:
            reason = "the number of experts" if most == eligible else "the number of LoRA experts"
            raise ValueError(
                f"Invalid top_k={self.top_k}. Must be from 1 to {most}, {reason} "
                f"that score={self.score!r} can choose from ({', '.join(self.experts)})."
            )
        if len(self.experts) == 1:
            warnings.warn(
                f"ranks={self.ranks[0]} has one expert, which always wins: nothing is routed. Give "
                "several ranks, such as 32,128.",
                stacklevel=4,
            )
        elif self.top_k == eligible > 1:
            warnings.warn(
                f"top_k={self.top_k} is the number of experts ({', '.join(self.eligible)}): all of "
                "them take every update, and nothing is routed. Give a lower top_k or more ranks.",
                stacklevel=4,
            )

    def without(self, modules: Iterable[str]) -> MoLFConfig:
        """Return a copy that also excludes some modules and their children.

        Args:
            modules: Full names of modules.
        """
        patterns, flags = self.exclude_modules, ""
        if not isinstance(patterns, str):
            endings = "|".join(map(re.escape, patterns))
            patterns = rf"(?:.*\.)?(?:{endings})" if endings else "(?!)"
        elif found := re.match(r"\(\?[aiLmsux]+\)", patterns):  # global flags must come first
            flags, patterns = found[0], patterns[found.end() :]
        names = "|".join(map(re.escape, modules))
        excluded = rf"{flags}(?:{patterns})|(?:{names})(?:\..*)?"
        return dataclasses.replace(self, exclude_modules=excluded) if names else self

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Alpha of each LoRA expert."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(self.ranks)

    @property
    def scalings(self) -> tuple[float, ...]:
        """Scaling `s_i` of each LoRA expert, `alpha / sqrt(rank)` or `alpha / rank`."""
        return tuple(
            alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for alpha, rank in zip(self.alphas, self.ranks, strict=True)
        )

    @property
    def routing(self) -> Routing:
        """Score and rule that `score` names."""
        return routing(self.score)

    @property
    def eligible(self) -> tuple[str, ...]:
        """Names of the experts that `score` chooses from; the controls exclude some."""
        return self.routing.rule.eligible(self.experts, self.lora_experts)

    @property
    def freezes_rest(self) -> bool:
        """`freeze_rest`, with the default resolved."""
        return self.freeze_base if self.freeze_rest is None else self.freeze_rest

    @property
    def lora_experts(self) -> tuple[str, ...]:
        """Names of the LoRA experts, `lora{i}_r{rank}`."""
        return lora_expert_names(self.ranks)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of all experts of a layer, in the order that breaks ties."""
        return self.lora_experts if self.freeze_base else ("full", *self.lora_experts)


def lora_expert_names(ranks: Iterable[int]) -> tuple[str, ...]:
    """Return the names of the LoRA experts with these ranks: `lora{i}_r{rank}`."""
    return tuple(f"lora{i}_r{rank}" for i, rank in enumerate(ranks))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    many = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(value) if many else (value,)


def _as_patterns(name: str, value: Any) -> str | tuple[str, ...]:
    """Check module patterns without a model."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"Invalid {name}={value!r}: not a regular expression: {error}."
            ) from None
        return value
    endings = _as_tuple(() if value is None else value)
    if not all(isinstance(ending, str) for ending in endings):
        raise ValueError(
            f"Invalid {name}={value!r}. Must be a list of name endings, or a regular expression."
        )
    return endings
