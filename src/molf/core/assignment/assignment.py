"""`molf.Assignment`: which linear layers are trained in full, which by LoRA, and which not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

from molf.core.assignment.assigned import (
    FROZEN,
    FULL,
    LORA,
    AssignedLayer,
    Decided,
    Treatment,
    weights_of,
)
from molf.core.assignment.choice import (
    at_random,
    by_score,
    by_shape,
    by_share,
    by_wins,
    count_sets,
    with_treatments,
)
from molf.core.assignment.patterns import Patterns, name_layers
from molf.core.assignment.text import from_values, is_explicit, parse, to_text
from molf.core.config import MoLFConfig
from molf.inputs import is_number
from molf.shown import counted, listed

if TYPE_CHECKING:
    from torch import nn

    from molf.core.assignment.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The training of every linear layer of a model: `full`, `lora` or `frozen`.

    Norms, embeddings, biases and all other parameters are the rest, which is trained unless
    `freeze_rest` is set or `frozen_rest` names a parameter. The head belongs to the rest, unless a
    pattern names it. `print` shows a summary.

    Attributes:
        entries: The layers, in the model's order.
        use_rslora: Whether alpha is for rank-stabilised scaling, `alpha / sqrt(r)`; else
            `alpha / r`.
        freeze_rest: Whether the rest is frozen.
        frozen_rest: Names of parameters of the rest that are frozen in any case.
        model: A description of the model.
        source: How the assignment was made, in one line.

    Raises:
        ValueError: There is no layer, or two have one name.
    """

    entries: tuple[AssignedLayer, ...]
    use_rslora: bool = False
    freeze_rest: bool = False
    frozen_rest: tuple[str, ...] = ()
    model: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Check the names."""
        names = Counter(layer.name for layer in self.entries)
        if not names:
            raise ValueError("An assignment needs at least one linear layer.")
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"Layer {twice[0]} is assigned twice.")

    @classmethod
    def expect(cls, value: Any) -> None:
        """Check that a value is an assignment, and no patterns or path that one is made from.

        Raises:
            TypeError: It is none.
        """
        if not isinstance(value, cls):
            raise TypeError(
                f"Invalid assignment of type {type(value).__name__}. Must be a molf.Assignment: "
                "molf.Assignment.from_patterns(model, PATTERNS) makes one, and "
                "molf.read_assignment(PATH, model) reads one."
            )

    @cached_property
    def layers(self) -> dict[str, AssignedLayer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.entries}

    def __getitem__(self, name: str) -> AssignedLayer:
        """Return the layer with this name."""
        return self.layers[name]

    def of_kind(self, train: str) -> tuple[AssignedLayer, ...]:
        """Return the layers that are `"full"`, `"lora"` or `"frozen"`."""
        return tuple(layer for layer in self.entries if layer.train == train)

    @property
    def full(self) -> tuple[AssignedLayer, ...]:
        """The layers whose weight is trained."""
        return self.of_kind(FULL)

    @property
    def lora(self) -> tuple[AssignedLayer, ...]:
        """The layers with an adapter."""
        return self.of_kind(LORA)

    @property
    def frozen(self) -> tuple[AssignedLayer, ...]:
        """The layers without training."""
        return self.of_kind(FROZEN)

    @property
    def share(self) -> float:
        """Share of the layers' weights that is trained in full."""
        return weights_of(self.full) / weights_of(self.entries)

    @classmethod
    def from_patterns(cls, model: nn.Module, patterns: Mapping[str, Any]) -> Assignment:
        """Build from patterns written by hand.

        A pattern is a run of whole dotted components of a name; `*` and `[0-3]` act inside one
        component. frozen wins over full, full over lora, an earlier entry of lora over a later one.
        A pattern of frozen also names other parameters: `model.layers.0` freezes the norms in it.

        Args:
            model: A plain model, also one without values (on the meta device).
            patterns: A mapping with the keys `full` and `frozen` (patterns), `lora` (a mapping of
                `r`, `alpha` and `modules`, or a list of these; without `alpha` the scaling is about
                2), `default` (of layers that no pattern names: `"full"`, `"frozen"`, a mapping of
                `r` and `alpha`, or `"lora"` beside one entry of lora), `freeze_rest` and
                `use_rslora`.

        Raises:
            ValueError: A key or value is not allowed; a pattern matches nothing, or only layers
                that others took; or a rank exceeds a layer's smaller side.

        Warns:
            UserWarning: Layers without a pattern stay frozen because `default` is missing.
        """
        from molf.core.assignment.layout import Layout

        return cls._named(Layout.of(model), Patterns.of(patterns))

    @classmethod
    def _named(cls, layout: Layout, patterns: Patterns) -> Assignment:
        named = name_layers(patterns, layout.layers, layout.heads, layout.rest)
        if named.unnamed and patterns.default is None:
            from molf.core.warn import warn

            warn(
                f"{len(named.unnamed)} of {counted(len(named.layers), 'layer')} are named by no "
                f"pattern and stay frozen (first: {named.unnamed[0]}). `default` (full, frozen, or "
                "r and alpha) chooses their training."
            )
        return cls(
            entries=named.layers,
            use_rslora=patterns.use_rslora,
            freeze_rest=patterns.freeze_rest,
            frozen_rest=named.frozen_rest,
            model=layout.model,
            source="patterns",
        )

    @classmethod
    def of(cls, optimizer: Any, *, share: float | None = None) -> Assignment:
        """Build from the decisions that a `MoLFAdamW` has taken so far.

        Each layer gets the expert that won most of its steps. Linear layers that are not routed are
        `full` if the optimizer trains their weight, else `frozen`.

        Args:
            optimizer: A `molf.MoLFAdamW` after at least one step.
            share: Ignore the wins, and give `full` to this share of the routed layers: to those
                where its score leads the LoRA experts' most (mean of the margins).

        Raises:
            TypeError: The optimizer is no `MoLFAdamW`.
            ValueError: It has not taken a step, or `share` is out of range.
        """
        from molf.core.assignment.decided import decided_by

        return cls.from_decisions(decided_by(optimizer), share=share)

    @classmethod
    def from_decisions(
        cls, decided: Decided, *, share: float | None = None, by: str = "wins"
    ) -> Assignment:
        """Build from the decisions of a routed training.

        An expert's rank above a layer's smaller side becomes that side, at the same scaling.

        Args:
            decided: The decisions, and the layers of the model.
            share: That of `of`.
            by: Without `share`: `"wins"`, the expert with the most wins; or `"score"`, `full` where
                its score leads on the mean of the steps.

        Raises:
            ValueError: No decision was taken, a layer is not in the model, or `share` or `by` is
                not allowed.
        """
        if by not in ("wins", "score"):
            raise ValueError(f"Invalid by={by!r}. Must be wins or score.")
        evidence = {name: one for name, one in decided.evidence.items() if one.decisions}
        every = {**decided.layers, **decided.heads}
        if strange := [name for name in decided.evidence if name not in every]:
            raise ValueError(
                f"The decisions are those of another model: {listed(strange, 3)} "
                f"{'is' if len(strange) == 1 else 'are'} not in {decided.model or 'this one'}."
            )
        if not evidence:
            raise ValueError(
                "No step was taken at a learning rate above 0, so there is no decision to build an "
                "assignment from."
            )
        if share is None and by == "wins":
            chosen = by_wins(evidence, decided.adapters)
            source = "the expert with the most wins"
        elif share is None:
            chosen = by_score(evidence, decided.adapters)
            source = "full where its score leads on the mean"
        else:
            chosen = by_share(evidence, decided.adapters, share)
            source = f"full in the {100 * share:g}% of layers where it leads most"
        steps = max(one.decisions for one in evidence.values())
        others = dict.fromkeys(decided.trained, Treatment(FULL))
        treatments = {
            name: chosen.get(name) or others.get(name) or Treatment(FROZEN)
            for name in every
            if name in decided.layers or name in chosen
        }
        return cls(
            entries=tuple(
                AssignedLayer(
                    name=name,
                    shape=every[name],
                    evidence=evidence.get(name),
                    **one.fitted(every[name], use_rslora=True)._asdict(),
                )
                for name, one in treatments.items()
            ),
            use_rslora=True,
            freeze_rest=decided.freeze_rest,
            frozen_rest=decided.frozen_rest,
            model=decided.model,
            source=f"{source}, {counted(steps, 'step')} of {decided.source}",
        )

    def random_like(self, seed: int) -> Assignment:
        """Return a control: other layers in full, drawn, with as many weights in all.

        Every set of layers with the same number of weights is equally likely. Frozen layers stay
        frozen. A layer that is no longer full gets the adapter of another one, whose rank becomes
        at most its smaller side, at the same scaling.

        Args:
            seed: Seed of the draw.

        Warns:
            UserWarning: No other set of layers has as many weights.
        """
        movable = tuple(layer for layer in self.entries if layer.train != FROZEN)
        if not self.full or count_sets(movable, weights_of(self.full)) == 1:
            from molf.core.warn import warn

            warn(
                "No other set of layers has as many weights: the control is the assignment itself."
            )
        source = f"random like {self.source or 'an assignment'}, seed {seed}"
        return self._with(at_random(self.entries, seed), source, use_rslora=self.use_rslora)

    def by_shape(
        self, config: MoLFConfig, *, lr: float = 1.0, lora_lr: float | None = None
    ) -> Assignment:
        """Return the assignment that shapes, scalings and rates alone predict.

        `full` where `lr > lora_lr s / sqrt(3) * out / (in + out)` for every LoRA expert: the winner
        by EPD at the start if gradients were noise (score `shape`). Frozen layers stay frozen. A
        rank above a layer's smaller side becomes that side, at the same scaling.

        Args:
            config: The LoRA experts: ranks, alpha, `use_rslora`.
            lr: Learning rate of `full`; only the ratio of the rates counts.
            lora_lr: Learning rate of the LoRA experts; None: `lr`.

        Raises:
            TypeError: `config` is no `MoLFConfig`, but that of a model, for example.
            ValueError: A rate is not positive and finite.
        """
        if not isinstance(config, MoLFConfig):
            raise TypeError(
                f"Invalid config of type {type(config).__name__}. Must be a molf.MoLFConfig, such "
                "as molf.MoLFConfig(ranks=16)."
            )
        rate = lr if lora_lr is None else lora_lr
        for name, value in (("lr", lr), ("lora_lr", rate)):
            if not (is_number(value, Real) and value > 0):
                raise ValueError(f"Invalid {name}={value!r}. Must be positive and finite.")
        made = by_shape(self.entries, config, lr, rate)
        source = f"by shape, lora_lr {rate / lr:g} times lr"
        return self._with(made, source, use_rslora=config.use_rslora)

    def with_options(
        self, *, freeze_rest: bool | None = None, use_rslora: bool | None = None
    ) -> Assignment:
        """Return a copy with other attributes of these names; None keeps one."""
        return replace(
            self,
            freeze_rest=self.freeze_rest if freeze_rest is None else freeze_rest,
            use_rslora=self.use_rslora if use_rslora is None else use_rslora,
        )

    def without(self, names: Iterable[str]) -> Assignment:
        """Return a copy in which some modules and their children are frozen.

        Args:
            names: Full names of modules.
        """
        inside = tuple(f"{name}." for name in names)
        frozen = {
            layer.name: Treatment(FROZEN)
            for layer in self.entries
            if f"{layer.name}.".startswith(inside)
        }
        entries = tuple(
            replace(layer, **frozen[layer.name]._asdict()) if layer.name in frozen else layer
            for layer in self.entries
        )
        return replace(self, entries=entries) if frozen else self

    def _with(
        self, treatments: Mapping[str, Treatment], source: str, *, use_rslora: bool
    ) -> Assignment:
        entries = with_treatments(self.entries, treatments, use_rslora=use_rslora)
        return replace(self, entries=entries, source=source, use_rslora=use_rslora)

    @classmethod
    def from_yaml(cls, text: str, model: nn.Module | None = None) -> Assignment:
        """Build from the text of a file: one entry per layer, as `to_yaml` writes, or patterns.

        Args:
            text: YAML.
            model: The model that is to be trained; may be left out for a file of `to_yaml`.

        Raises:
            ValueError: The text is no assignment, or that of a model with other layers; or it has
                patterns and `model` is None.
        """
        from molf.core.assignment.layout import Layout

        layout = None if model is None else Layout.of(model)
        return cls.of_values(parse(text), layout)

    @classmethod
    def of_values(cls, values: Mapping[str, Any], layout: Layout | None) -> Assignment:
        """Build from the content of a file; `from_yaml` has the errors."""
        if is_explicit(values):
            made = cls(**from_values(values))
            if layout is not None:
                made.check(layout)
            return made
        patterns = Patterns.of(values)
        if layout is None:
            raise ValueError("The file has patterns instead of layers. Give the model, too.")
        return cls._named(layout, patterns)

    def to_yaml(self) -> str:
        """Return the assignment as YAML, one line per layer; `from_yaml` is the inverse."""
        return to_text(
            self.entries,
            model=self.model,
            source=self.source,
            use_rslora=self.use_rslora,
            freeze_rest=self.freeze_rest,
            frozen_rest=self.frozen_rest,
        )

    def check(self, layout: Layout) -> None:
        """Check that a model has the layers of this assignment, with the same shapes.

        Raises:
            ValueError: It has not; the message names the layers that differ.
        """
        known = {**layout.layers, **layout.heads}
        missing = [name for name in self.layers if name not in known]
        extra = [name for name in layout.layers if name not in self.layers]
        other = [one for one in self.entries if known.get(one.name, one.shape) != one.shape]
        gone = [name for name in self.frozen_rest if name not in layout.rest]
        differences = []
        if missing:
            differences.append(f"the model has no {listed(missing, 3)}")
        if extra:
            differences.append(f"the assignment has no {listed(extra, 3)}")
        if other:
            first = other[0]
            shape = "x".join(map(str, known[first.name]))
            more = f" (and {len(other) - 1} more differ)" if len(other) > 1 else ""
            differences.append(f"{first.name} is {first.shown} there and {shape} here{more}")
        if gone:
            differences.append(f"the model has no {listed(gone, 3)}, named by frozen_rest")
        if differences:
            whose = f" ({self.model})" if self.model else ""
            raise ValueError(
                f"The assignment is for another model{whose} than {layout.model or 'this one'}: "
                f"{'; '.join(differences)}."
            )

    def __str__(self) -> str:
        """Return a summary in one line."""
        ranks = sorted({layer.r for layer in self.lora if layer.r is not None})
        adapters = f" (r {', '.join(map(str, ranks))})" if ranks else ""
        rest = "trained"
        if self.freeze_rest:
            rest = "frozen"
        elif self.frozen_rest:
            rest = f"trained, but for {counted(len(self.frozen_rest), 'parameter')}"
        return (
            f"{counted(len(self.entries), 'layer')}: {len(self.full)} full ({self.share:.1%} of "
            f"the layers' weights), {len(self.lora)} lora{adapters}, {len(self.frozen)} frozen; "
            f"the rest is {rest}"
        )
