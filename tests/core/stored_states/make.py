"""Write the states that `test_stored_states.py` loads: `python tests/core/stored_states/make.py`.

Each file was written by the version of the commit that added it, and is never written again: a
later version must load it and continue. Run this only to add a form or a storage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "helpers"))

from core_helpers import TinyModel, feed, snapshot  # noqa: E402
from optimizer_forms import FORMS, in_form  # noqa: E402

STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "exact": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "weight_rounding": "stochastic"},
    "8bit": {"dtype": torch.bfloat16, "state_dtype": "8bit"},
    "8bit-narrow": {"dtype": torch.bfloat16, "state_dtype": "8bit"},
}
# Moments of tensors from 4,096 elements on are kept in 8 bits: here of the two linear layers, whose
# rows are whole blocks of 256, and (narrow) a part of one.
SIZES = {"8bit": {"width": 16, "hidden": 256}, "8bit-narrow": {"width": 64, "hidden": 64}}
BEFORE, AFTER = 3, 2  # steps before the state was saved, and after


def build(form: str, storage: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with `nn.Linear` and `Conv1D`, and its optimizer, before the first step."""
    options = dict(STORAGES[storage])
    dtype = options.pop("dtype", torch.float32)
    torch.manual_seed(0)
    model = TinyModel(**SIZES.get(storage, {}))
    model.up = Conv1D(model.up.out_features, model.up.in_features)
    return in_form(form, model.to(dtype), **options)


def continue_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int
) -> dict[str, Any]:
    """Take steps with gradients that the step's number decides; return weights and state."""
    for step in range(first, first + steps):
        feed(model, step, scale=0.1)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        optimizer.step()
    return snapshot(model, optimizer)


def machine() -> dict[str, str]:
    """What the last bits of a product or a vectorised kernel depend on."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor(),
    }


def vendor() -> str:
    """The processor's vendor, whose products MKL computes by other kernels; empty if unknown."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def main() -> None:
    """Write the files that are not there yet."""
    for form in FORMS:
        for storage in STORAGES:
            path = HERE / f"{form}-{storage}.pt"
            if path.exists() or (storage == "8bit-narrow" and form not in ("folded", "fft")):
                continue
            model, optimizer = build(form, storage)
            continue_for(model, optimizer, 0, BEFORE)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved = {key: _copied(value) for key, value in saved.items()}
            after = continue_for(model, optimizer, BEFORE, AFTER)
            torch.save({**saved, "after": after, "machine": machine()}, path)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
