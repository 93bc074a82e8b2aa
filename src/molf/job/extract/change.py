"""The change of a trained model: linear layers as factors of low rank, and all other parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.model.linear_layers import head_name
from molf.core.model.linear_places import Place, is_conv1d, linear_places
from molf.core.model.module_names import cleaner
from molf.errors import InputError
from molf.shown import listed

_SHARE = 0.9  # of the squared change, for `rank_90`


@dataclass(frozen=True)
class LayerChange:
    """The change W - W0 of a linear layer, and its best approximation of a rank.

    Attributes:
        name: The layer's name in the plain model.
        shape: (out, in).
        rank: Rank of the factors: the requested one, or the layer's smaller side.
        relative: Frobenius norm of the change, relative to that of W0; infinite from zero.
        kept: Share of the squared change that the factors keep.
        error: Distance of the factors' product from the change, relative to the change.
        rank_90: Smallest rank that keeps 90% of the squared change.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    relative: float
    kept: float
    error: float
    rank_90: int

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "shape": list(self.shape), "relative": _finite(self.relative)}


@dataclass(frozen=True)
class RestChange:
    """The change of a parameter that factors of linear layers do not hold.

    Attributes:
        name: Its name in the plain model.
        kind: `norm`, `bias`, `embeddings`, `head` or `other`.
        module: Name of the module that holds it.
        numel: Number of elements.
        relative: Norm of the change, relative to that of the base's; infinite from zero.
        largest: Largest absolute change of an element.
        also: Other names of the same parameter, if it is tied.
        error: Distance of the written values from the trained ones, relative to the change; 1 if
            none are written.
    """

    name: str
    kind: str
    module: str
    numel: int
    relative: float
    largest: float
    also: tuple[str, ...] = ()
    error: float = 1.0

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "also": list(self.also), "relative": _finite(self.relative)}


@dataclass
class Factors:
    """The factors of a layer, rounded as they are written.

    Attributes:
        A: float32 [r, in].
        B: float32 [out, r]; the change is B A.
    """

    A: Tensor
    B: Tensor


def adapted_places(model: nn.Module) -> dict[str, Place]:
    """Return the linear layers that an adapter can hold, by name.

    Layers that the model does not call, or whose weight is shared (a head tied to the embeddings),
    are left out.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        place.name: place
        for place in linear_places(model)
        if not place.is_bypassed
        and isinstance(place.weight, nn.Parameter)
        and uses.get(id(place.weight), 0) == 1
    }


def largest_rank(model: nn.Module) -> int:
    """Return the largest smaller side of the layers that an adapter can hold; 0 without any."""
    return max((min(_shape(place)) for place in adapted_places(model).values()), default=0)


def check_same_layers(base: nn.Module, tuned: nn.Module, base_name: str) -> None:
    """Check that two models have the same parameters.

    Raises:
        InputError: They have not.
    """
    shapes = [{n: tuple(p.shape) for n, p in one.named_parameters()} for one in (base, tuned)]
    names = {**shapes[0], **shapes[1]}
    different = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if different:
        raise InputError(
            f"The base {base_name} is not that of the run: {listed(different, 3)} "
            f"{'differs' if len(different) == 1 else 'differ'} from the trained model in shape or "
            "name."
        )


def factorise(
    base: nn.Module, tuned: nn.Module, rank: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[LayerChange, Factors]]:
    """Yield the changed linear layers with their factors, by truncated SVD of W - W0.

    Args:
        base: The base model, with W0.
        tuned: The trained model, with W.
        rank: Rank of the factors; a layer with a smaller side gets that.
        dtype: Type that the factors are rounded to.
        device: Device of the decompositions.
    """
    others = adapted_places(tuned)
    for name, place in adapted_places(base).items():
        old, new = (_matrix(one).to(device, torch.float32) for one in (place, others[name]))
        change = new - old
        if not bool(change.any()):
            continue
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        r = min(rank, len(values))
        squares = values.double().square()
        total = squares.sum()
        shares = squares.cumsum(0) / total
        root = values[:r].sqrt()
        factors = Factors(
            A=rounded(root[:, None] * right[:r], dtype).contiguous(),
            B=rounded(left[:, :r] * root, dtype).contiguous(),
        )
        error = ((change - factors.B @ factors.A).norm() / change.norm()).item()
        yield (
            LayerChange(
                name=name,
                shape=(change.shape[0], change.shape[1]),
                rank=r,
                relative=_ratio(change, old),
                kept=float(shares[r - 1]),
                error=error,
                rank_90=int((shares < _SHARE).sum()) + 1,
            ),
            Factors(factors.A.cpu(), factors.B.cpu()),
        )


def changes_of_rest(base: nn.Module, tuned: nn.Module) -> Iterator[RestChange]:
    """Yield the changed parameters that are no weight of `adapted_places`."""
    weights = {place.parameter_names[0] for place in adapted_places(base).values()}
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others, head = dict(tuned.named_parameters()), head_name(base)
    for name, parameter in base.named_parameters():
        if name in weights:
            continue
        old, new = parameter.detach().float(), others[name].detach().float()
        change = new - old
        if bool(change.any()):
            module = name.rpartition(".")[0]
            yield RestChange(
                name=name,
                kind=_kind(name, base.get_submodule(module), is_head=module == head),
                module=module,
                numel=parameter.numel(),
                relative=_ratio(change, old),
                largest=change.abs().max().item(),
                also=tuple(other for other in names[id(parameter)] if other != name),
            )


def as_written(one: RestChange, base: nn.Module, tuned: nn.Module, value: Tensor) -> RestChange:
    """Return the change of a parameter with the error of the value that an adapter holds."""
    old, new = (model.get_parameter(one.name).detach().float() for model in (base, tuned))
    return replace(one, error=((value - new).norm() / (new - old).norm()).item())


def replace_by_factors(tuned: nn.Module, base: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Set the linear layers of the trained model to W0 + B A, in place."""
    others = adapted_places(base)
    with torch.no_grad():
        for name, place in adapted_places(tuned).items():
            if name in factors:
                weight, one = place.weight, factors[name]
                assert isinstance(weight, nn.Parameter)
                update = (one.B @ one.A).to(weight.device)
                merged = _matrix(others[name]).to(weight.device, torch.float32) + update
                weight.copy_(merged.t() if is_conv1d(place.module) else merged)


def set_parameters(tuned: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters of the trained model by name, in place."""
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers that are rounded to a type."""
    return values.to(dtype).to(torch.float32)


def _matrix(place: Place) -> Tensor:
    """Return a weight as [out, in]."""
    weight = place.weight
    assert isinstance(weight, nn.Parameter)
    values = weight.detach()
    return values.t() if is_conv1d(place.module) else values


def _shape(place: Place) -> tuple[int, int]:
    weight = _matrix(place)
    return weight.shape[0], weight.shape[1]


def _ratio(change: Tensor, old: Tensor) -> float:
    size = old.norm().item()
    return change.norm().item() / size if size else float("inf")


def _finite(number: float) -> float | None:
    """Return a number for JSON, which has no infinity."""
    return number if math.isfinite(number) else None


def _kind(name: str, module: nn.Module, *, is_head: bool) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if is_head:
        return "head"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "bias" if name.endswith("bias") else "other"


def conv1d_only(base: nn.Module, names: set[str]) -> bool:
    """Return whether all of these layers store their weight as [in, out] (GPT-2)."""
    clean = cleaner(base)
    modules = {clean(name): module for name, module in base.named_modules()}
    return all(is_conv1d(modules[name]) for name in names)
