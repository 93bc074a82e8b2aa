"""Parameters of a model that are not routed, by kind of module and by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molf.core.config import MoLFConfig
from molf.core.model.decay import is_vector
from molf.core.model.linear_layers import LinearLayer, head_name, is_in_head, weights_of
from molf.core.model.linear_places import linear_places
from molf.core.model.module_names import cleaner
from molf.core.warn import warn
from molf.shown import counted, listed

_SMALLEST_SHARE = 0.01  # of the parameters; kinds below it are counted without a warning
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_TABLE = re.compile(r"embed|position|token|(^|[._])pos([._]|$)", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe|mixture", re.IGNORECASE)
# Classes of torch whose parameters are matrices, whatever their names.
_MATRICES = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_OF_TORCH = (*_MATRICES, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Unrouted:
    """Parameters of one kind that no layer routes.

    Attributes:
        kind: Class of their modules: `"LSTM"`, `"Embedding"`, `"LayerNorm"`.
        names: Names in the model.
        parameters: Number of elements.
        trained: Number of tensors that are trained by plain AdamW; the others are frozen.
        is_matrix: True for recurrent weights, convolutions, fused experts and other matrices. False
            for embeddings, norms, biases, a head and excluded linear layers.
        is_fused: True for 3-D weights of a mixture's experts.
    """

    kind: str
    names: tuple[str, ...]
    parameters: int
    trained: int
    is_matrix: bool = False
    is_fused: bool = False


@dataclass(frozen=True)
class Coverage:
    """Share of a model that is routed; `print` shows a table.

    Attributes:
        layers: Number of routed layers.
        routed: Elements of their weights and biases; in the adapter form of the adapted weights.
        parameters: Elements of the model, without adapters.
        unrouted: Other parameters by kind, largest first.
    """

    layers: int
    routed: int
    parameters: int
    unrouted: tuple[Unrouted, ...]

    @property
    def share(self) -> float:
        """Routed share of the parameters."""
        return self.routed / self.parameters

    def __str__(self) -> str:
        """Return one line per kind."""
        rest = "; not routed are:" if self.unrouted else "."
        lines = [
            f"{self.share:6.1%} of {self.parameters:,} parameters are routed, in "
            f"{counted(self.layers, 'layer')}{rest}"
        ]
        for kind in self.unrouted:
            training = {0: "frozen", len(kind.names): "plain AdamW"}.get(
                kind.trained, f"{kind.trained} plain AdamW, others frozen"
            )
            names = ", ".join(kind.names[:3]) + (", ..." if len(kind.names) > 3 else "")
            share = kind.parameters / self.parameters
            tensors = counted(len(kind.names), "tensor")
            lines.append(f"{share:6.1%} {kind.kind}, {tensors} ({training}): {names}")
        return "\n".join(lines)


def coverage_of(
    model: nn.Module,
    routed: Collection[Tensor],
    layers: int,
    *,
    trains_rest: bool,
    uses_adapter: bool = False,
    adapted: Collection[str] = (),
) -> Coverage:
    """Count routed and other parameters.

    Args:
        model: The model, plain or with an adapter.
        routed: Weights and biases of routed layers.
        layers: Number of routed layers.
        trains_rest: Whether parameters that are not routed are trained if they require gradients.
        uses_adapter: Whether the adapter form is used, which routes only layers that are called.
        adapted: Names of adapted layers; their weights count as routed.
    """
    weights, kinds = set(routed), dict[tuple[str, bool, bool], list[_Own]]()
    total = in_layers = 0
    for own in _own_parameters(model, uses_adapter=uses_adapter):
        total += own.parameter.numel()
        # By name: PEFT creates new parameters of attention each time modules are listed.
        if own.parameter in weights or (own.owner in adapted and own.parameter.dim() == 2):
            in_layers += own.parameter.numel()
        else:
            kinds.setdefault((own.kind, own.is_matrix, own.is_fused), []).append(own)
    unrouted = [
        Unrouted(
            kind,
            tuple(own.name for own in members),
            sum(own.parameter.numel() for own in members),
            sum(trains_rest and own.parameter.requires_grad for own in members),
            is_matrix,
            is_fused,
        )
        for (kind, is_matrix, is_fused), members in kinds.items()
    ]
    unrouted.sort(key=lambda kind: -kind.parameters)
    return Coverage(layers, in_layers, max(total, 1), tuple(unrouted))


def warn_before_training(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    config: MoLFConfig,
    *,
    in_adapter: bool,
    has_adapter: bool,
) -> None:
    """Give the warnings of `warn_of_unrouted` for a plain model before its optimizer is built.

    Args:
        model: The model, with or without values.
        layers: Layers that will be routed, or adapted.
        config: The method's settings.
        in_adapter: Whether a plain adapter will be trained (no routing).
        has_adapter: Whether the factors will be in a PEFT adapter.
    """
    coverage = coverage_of(
        model,
        weights_of(layers),
        len(layers),
        trains_rest=not in_adapter and not config.freezes_rest,
        uses_adapter=has_adapter,
    )
    warn_of_unrouted(coverage, use="adapted" if in_adapter else "routed")


def warn_of_unrouted(coverage: Coverage, *, use: str = "routed") -> None:
    """Warn of matrices that cannot be routed.

    Args:
        coverage: Coverage of the model.
        use: What layers are: "routed"; "adapted" by a plain adapter; or "assigned".

    Warns:
        UserWarning: With kind, share and first name of each kind of at least 1% of the parameters.
    """
    kinds = [
        kind
        for kind in coverage.unrouted
        if kind.is_matrix and kind.parameters >= _SMALLEST_SHARE * coverage.parameters
    ]
    if not kinds:
        return
    trained, tensors = sum(kind.trained for kind in kinds), sum(len(kind.names) for kind in kinds)
    outcome = f"plain AdamW trains {trained} of {tensors}, the others stay frozen"
    if trained == 0:
        outcome = "it stays frozen" if tensors == 1 else "they stay frozen"
    elif trained == tensors:
        outcome = f"{'it takes' if tensors == 1 else 'they take'} plain AdamW steps"
    parts = []
    for kind in kinds:
        weights = "fused 3-D weight" if kind.is_fused else f"{kind.kind} weight"
        share = f"{kind.parameters / coverage.parameters:.0%} of the parameters"
        details = f"{'mixture-of-experts; ' * kind.is_fused}{share}; first: {kind.names[0]}"
        parts.append(f"{counted(len(kind.names), weights)} ({details})")
    warn(f"{listed(parts, 4)} cannot be {use}: {outcome}.")


class _Own(NamedTuple):
    """A parameter of the model and its kind."""

    name: str
    owner: str
    parameter: nn.Parameter
    kind: str
    is_matrix: bool
    is_fused: bool


def _own_parameters(model: nn.Module, *, uses_adapter: bool) -> Iterator[_Own]:
    """Yield every parameter once, without those of adapters."""
    clean, head = cleaner(model), head_name(model)
    places = {place.weight: place for place in linear_places(model)}
    modules = dict(model.named_modules())
    tuners = {name for name, m in modules.items() if hasattr(m, "adapter_layer_names")}
    seen: set[nn.Parameter] = set()
    for raw, module in modules.items():
        if _is_adapters(raw, tuners):
            continue
        for key, parameter in module._parameters.items():
            # A tied parameter counts once, at its first place.
            if parameter is None or parameter in seen:
                continue
            seen.add(parameter)
            # Tensors of a parametrization are children of the module whose weight it computes.
            owner_name = re.sub(r"(^|\.)parametrizations\.\w+$", "", raw)
            owner = modules[owner_name]
            name = clean(".".join(filter(None, (raw, key))))
            kind = type(owner).__name__.removeprefix("Parametrized")
            place = places.get(parameter)
            if place is not None and place.is_bypassed:
                kind = nn.MultiheadAttention.__name__
            words = ".".join((name, type(owner).__name__, _parent_class(owner_name, modules)))
            # A linear layer that is not routed is excluded by the configuration, or frozen.
            is_matrix = (
                uses_adapter and place.is_bypassed
                if place
                else _multiplies(owner, key, words, parameter)
            )
            is_matrix = is_matrix and not is_in_head(clean(owner_name), head)
            is_fused = is_matrix and parameter.dim() == 3 and not isinstance(owner, _OF_TORCH)
            is_fused = is_fused and _EXPERTS.search(words) is not None
            layer = clean(owner_name).removesuffix(".base_layer")
            yield _Own(name, layer, parameter, kind, is_matrix, is_fused)


def _is_adapters(raw: str, tuners: Collection[str]) -> bool:
    """Return whether a module has an adapter's parameters: it is in a tuner, and not in its base.

    Args:
        raw: Name of the module.
        tuners: Names of PEFT's layers.
    """
    parts = raw.split(".")
    return any(
        ".".join(parts[:end]) in tuners and parts[end : end + 1] != ["base_layer"]
        for end in range(1, len(parts) + 1)
    )


def _parent_class(name: str, modules: dict[str, nn.Module]) -> str:
    return type(modules[name.rpartition(".")[0]]).__name__ if "." in name else ""


def _multiplies(owner: nn.Module, key: str, words: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a matrix other than an embedding or a norm."""
    if is_vector(key, parameter):
        return False
    if isinstance(owner, _MATRICES):
        return True
    # By name too: a convolution may embed the patches of an image.
    is_table = isinstance(owner, _TABLES) or _TABLE.search(words) is not None
    return not (is_table or "norm" in type(owner).__name__.lower())
