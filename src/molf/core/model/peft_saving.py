"""PEFT models that train parameters outside their adapter: weights in full, norms and embeddings.

PEFT takes these for the frozen base. It saves the adapter alone, so that a resumed training would
go on with the base's values beside the optimizer's later state; and TRL computes the reference of
DPO with another adapter, beside weights that have been trained since.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from molf.core.model.adapted_layers import adapter_layers
from molf.core.model.module_names import cleaner
from molf.shown import counted


class WholePeftModel(PeftModel):
    """A PEFT model whose adapter file also holds the trained parameters outside the adapter.

    They have their names in the model, as PEFT saves trained embeddings. So
    `PeftModel.from_pretrained(base, path)` and the Trainer's resumption load them, without molf.
    With such parameters the model has one adapter, which cannot be disabled.

    Attributes:
        trained_beside: Names of these parameters.
    """

    trained_beside: tuple[str, ...]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the adapter as `PeftModel.save_pretrained`, and the other trained parameters in it.

        Raises:
            ValueError: `safe_serialization=False`, or a `state_dict` without these parameters.
        """
        if not safe_serialization and self.trained_beside:
            raise ValueError(
                "safe_serialization=False saves the adapter alone, and "
                f"{counted(len(self.trained_beside), 'parameter')} outside it are trained. "
                "Leave it out."
            )
        values = kwargs.get("state_dict")
        values = self.state_dict() if values is None else values
        lost = [name for name in self.trained_beside if name not in values]
        if lost and is_main_process:  # only the main process has a gathered state
            raise ValueError(
                f"Invalid state_dict: it lacks {counted(len(lost), 'trained parameter')} outside "
                f"the adapter (first: {lost[0]})."
            )
        super().save_pretrained(
            str(save_directory),
            safe_serialization,
            selected_adapters,
            *args,
            is_main_process=is_main_process,
            **kwargs,
        )
        if is_main_process and self.trained_beside:
            beside = {
                name: values[name].detach().cpu().contiguous() for name in self.trained_beside
            }
            for adapter in selected_adapters or self.peft_config:
                _add(beside, _file(save_directory, adapter))

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Load an adapter as `PeftModel.load_adapter`; the own one with all trained parameters.

        Raises:
            ValueError: `model_id` is a folder whose file lacks some of them, so that they would
                keep their present values beside factors of another training.
        """
        path = Path(model_id) / SAFETENSORS_WEIGHTS_NAME
        if adapter_name in self.peft_config and path.is_file():
            with safe_open(path, "pt") as file:
                lost = set(self.trained_beside) - set(file.keys())
            if lost:
                raise ValueError(
                    f"{path} lacks {counted(len(lost), 'trained parameter')} outside the adapter "
                    f"(first: {min(lost)}). It is the adapter of another model, or was saved "
                    "without molf.with_assignment or molf.with_adapter."
                )
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as `PeftModel.add_adapter`.

        Raises:
            ValueError: Parameters outside the adapter are trained.
        """
        self._refuse(f"a further adapter ({adapter_name}) would be")
        super().add_adapter(adapter_name, *args, **kwargs)

    def disable_adapter(self) -> Any:
        """Disable the adapter as `PeftModel.disable_adapter`.

        Raises:
            ValueError: Parameters outside the adapter are trained.
        """
        self._refuse("without its adapter the model would be")
        return super().disable_adapter()

    def _refuse(self, use: str) -> None:
        if self.trained_beside:
            count = counted(len(self.trained_beside), "parameter")
            raise ValueError(
                f"{count} outside the adapter are trained (first: {self.trained_beside[0]}), so "
                f"{use} beside trained weights, not beside the base. For a reference give "
                "DPOTrainer and KTOTrainer ref_model, and GRPOTrainer beta=0."
            )


class WholePeftModelForCausalLM(WholePeftModel, PeftModelForCausalLM):
    """The same with `generate`."""


_KINDS = {PeftModel: WholePeftModel, PeftModelForCausalLM: WholePeftModelForCausalLM}


def save_whole(model: Any) -> None:
    """Let a new PEFT model save all parameters that are trained now; changed in place.

    Args:
        model: The result of `peft.get_peft_model`, with `requires_grad` set.
    """
    tuners = tuple(f"{name}." for name in adapter_layers(model))
    # peft.get_peft_model chooses the class, and these add methods alone.
    model.__class__ = _KINDS[type(model)]
    model.trained_beside = tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (name.startswith(tuners) and ".base_layer." not in name)
    )


def saved_beside(model: nn.Module) -> set[str]:
    """Return the names of the parameters outside the adapter that a model saves with it."""
    clean = cleaner(model)
    return {
        clean(f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        if isinstance(module, WholePeftModel)
        for name in module.trained_beside
    }


def _file(directory: str | os.PathLike[str], adapter: str) -> Path:
    """Return the file in which PEFT saves an adapter."""
    folder = Path(directory) if adapter == "default" else Path(directory) / adapter
    return folder / SAFETENSORS_WEIGHTS_NAME


def _add(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Add tensors to a safetensors file, which is never half-written."""
    new = path.with_name(f"{path.name}.new")
    save_file({**load_file(path), **tensors}, new, metadata={"format": "pt"})
    os.replace(new, path)
