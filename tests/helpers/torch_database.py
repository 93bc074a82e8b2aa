"""torch's own database of optimizer inputs, our optimizers as its subjects, and what differs.

The database holds what torch's test suite runs every optimizer with. It is in the wheel, but
private.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from molf import AdamW, MoLFAdamW, MoLFConfig

# Keywords of `torch.optim.AdamW` that ours do not take, and why; docs/optimizer.md has the same.
REFUSED_KEYWORDS = {
    "amsgrad": "The scores of the experts are defined with Adam's two moments.",
    "maximize": "`(-loss).backward()` does the same.",
    "foreach": "There is one way to compute a step, for any number of tensors.",
    "fused": "On a CPU torch's fused kernel computes float32 steps anyway.",
    "capturable": "The host reads the scores in every step, and a CUDA graph has no host.",
    "differentiable": "A step writes weights in place.",
}
# All other intended differences.
OTHER_DIFFERENCES = {
    "an infinite `lr`, `eps` or `weight_decay`": "No valid step exists.",
    "`eps=0`": "A LoRA factor without a gradient so far would become 0 / 0.",
    "one beta a number, the other a tensor": "Both are read as numbers.",
    "one tensor as the `lr` of several groups": "A scheduler would multiply it once per group.",
    "a group without names beside groups with names": "Names are used for messages and seeds only.",
    "keys of `param_groups`": "The keywords of the missing keys are not accepted.",
    "an infinite or NaN gradient": "NaN would never leave the moments.",
    "a later step without any gradient": "It is nearly always an error in the training loop.",
    "a first step with gradients, but none in a routed layer (`from_model`)": (
        "Nothing would be routed."
    ),
    "a parameter that was replaced in the model, resized after a step, or flattened in its group "
    "(`from_model`)": "The model would train without it.",
    "complex weights of layers": "Scores are defined for real weights.",
    "weights below float32": "Small updates would be rounded away.",
    '`state[parameter]["step"]`': "Reading a number never waits for a device.",
    "a saved state of another optimizer": "Its numbers have another meaning.",
    "a saved state of parameters with other names": (
        "Moments would be loaded into the wrong parameters."
    ),
    "names in a saved state": "The optimizer has the names of its own model.",
    "tensors of a loaded state": "Two optimizers would write to the same moments.",
    "moments of another shape": "The fused kernel would write past the ends of memory.",
    "sharded parameters (DTensor)": "A step needs whole rows of a weight.",
    "`torch.compile` of a step": "The host chooses the winners in the middle of a step.",
    "`MoLFAdamW(module.parameters())`": "Routing needs the layers.",
}


def entry() -> Any:
    """Return the database's entry for AdamW.

    Raises:
        ImportError: The module, or what it imports (expecttest), is not there.
        AttributeError: Its parts have other names now.
        LookupError: It has no AdamW.
    """
    # Its import forbids the whole process to set flags of torch.backends; this lifts that again.
    with torch.backends.__allow_nonbracketed_mutation():
        from torch.testing._internal import common_optimizers as database
    found = [one for one in database.optim_db if one.optim_cls is torch.optim.AdamW]
    if not found:
        raise LookupError("no entry for AdamW")
    return found[0]


@dataclass(frozen=True)
class Subject:
    """An optimizer of ours, built as `torch.optim.AdamW` is and with its defaults.

    Attributes:
        name: Of the subject, in the names of tests.
        score: How layers choose their expert; None is `molf.AdamW`, which routes nothing.
    """

    name: str
    score: str | None = None

    def __call__(self, params: Iterable[Any], **options: Any) -> AdamW:
        """Build it; every matrix is the weight of a routed layer."""
        if self.score is None:
            return AdamW(params, **options)
        given = list(params)
        groups: list[dict[str, Any]] = []
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            members = group["params"]
            for member in [members] if isinstance(members, Tensor) else members:
                tensor = member if isinstance(member, Tensor) else member[1]
                is_routed = tensor.dim() == 2 and tensor.numel() > 0
                layer = {**_structure(self.score), "layer": f"layer{len(groups)}"}
                groups.append({**group, **(layer if is_routed else {}), "params": [member]})
        return MoLFAdamW(groups, **{"lr": 1e-3, "weight_decay": 1e-2, **options})

    def beside_a_layer(self, params: Any, **options: Any) -> AdamW:
        """Build it with params as they are, in plain groups behind a layer of its own."""
        if self.score is None:
            return AdamW(params, **options)
        if isinstance(params, Tensor):
            return MoLFAdamW(params, **options)
        layer = {**_structure(self.score), "layer": "own", "params": nn.Parameter(torch.ones(4, 4))}
        is_groups = isinstance(next(iter(params), None), dict)
        return MoLFAdamW([layer, *(params if is_groups else [{"params": params}])], **options)


SUBJECTS = [Subject("adamw"), Subject("routed", "epd")]
# Where the full expert always wins, a layer moves as AdamW moves it.
LIKE_TORCH = [Subject("adamw"), Subject("full", "full")]


@cache
def _structure(score: str) -> dict[str, Any]:
    """What the group of a routed layer has beside AdamW's own options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoLFConfig(ranks=(1,), score=score)
        layer = MoLFAdamW.from_model(nn.Linear(4, 4, bias=False), config).param_groups[0]
    plain = AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0]
    own = set(layer) - {*plain, "param_names"} | {"transposed"}
    return {key: layer[key] for key in own}


@dataclass
class Problem:
    """Least squares with a matrix and a bias.

    Attributes:
        weight: [10, 5].
        bias: [10].
        x: [5].
    """

    weight: nn.Parameter
    bias: nn.Parameter
    x: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float32, *, contiguous: bool = True) -> Problem:
        """Return one, the same for the same arguments."""
        generator = torch.Generator().manual_seed(0)

        def tensor(*shape: int) -> Tensor:
            both = torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype)
            return both[..., 0].contiguous() if contiguous else both[..., 0]

        return cls(nn.Parameter(tensor(10, 5)), nn.Parameter(tensor(10)), tensor(5))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight and the bias."""
        return [self.weight, self.bias]

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The same with names."""
        return [("weight", self.weight), ("bias", self.bias)]

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def copy(self) -> Problem:
        """The same with parameters of its own."""
        return copy.deepcopy(self)

    def backward(self) -> Tensor:
        """Set the gradients, not contiguous where the weight is not; return the loss."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.x) + self.bias).pow(2).sum()
        loss.backward()
        if not self.weight.is_contiguous():
            for parameter in self.parameters:
                assert parameter.grad is not None
                wide = parameter.new_empty(*parameter.shape, 2)
                parameter.grad = wide[..., 0].copy_(parameter.grad)
        return loss.detach()

    def run(self, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
        """Take steps; return copies of the parameters."""
        for _ in range(steps):
            self.backward()
            optimizer.step()
        return self.values()


def assert_equal(got: Any, expected: Any) -> None:
    """Compare tensors, or several of them, number for number."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
