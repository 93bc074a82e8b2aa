"""Assignments as YAML that a person can read and edit: one line per layer.

Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molf.core.assignment.assigned import (
    KINDS,
    LORA,
    AssignedLayer,
    Evidence,
    check_rank,
    default_alpha,
)
from molf.inputs import check_installed, reading_yaml

_KEYS = (
    "model",
    "source",
    "use_rslora",
    "freeze_rest",
    "lora",
    "layers",
    "frozen_rest",
    "evidence",
)

_LAYER_KEYS = ("train", "r", "alpha", "shape")
_HEADING = """\
# An assignment of molf. Each layer has one line, with the shape (out x in) that it must have:
#   train: full     trains the weight
#   train: lora     trains an adapter beside the frozen weight; r and alpha are those of `lora`
#                   unless the line has its own; r without alpha gives a scaling of about 2
#   train: frozen   trains neither
# Norms, embeddings and biases are trained, unless freeze_rest is true or frozen_rest names them.
"""


def is_explicit(values: Mapping[Any, Any]) -> bool:
    """Return whether the content of a file has one entry per layer, instead of patterns."""
    return "layers" in values


def to_text(
    layers: Sequence[AssignedLayer],
    *,
    model: str,
    source: str,
    use_rslora: bool,
    freeze_rest: bool,
    frozen_rest: Sequence[str],
) -> str:
    """Return the YAML of an assignment; the arguments are its attributes."""
    adapters = Counter((layer.r, layer.alpha) for layer in layers if layer.train == LORA)
    common = max(adapters, key=adapters.__getitem__) if adapters else None
    lines = [
        *(
            f"{name}: {_flow(value)}"
            for name, value in (("model", model), ("source", source))
            if value
        ),
        f"use_rslora: {_flow(use_rslora)}",
        f"freeze_rest: {_flow(freeze_rest)}",
    ]
    if common is not None:
        lines.append(f"lora: {_flow({'r': common[0], 'alpha': common[1]})}")
    lines += ["layers:", *(f"  {_flow(one.name)}: {_line(one, common)}" for one in layers)]
    if frozen_rest:
        lines += ["frozen_rest:", *(f"  - {_flow(name)}" for name in frozen_rest)]
    if any(layer.evidence for layer in layers):
        lines += [
            "# The decisions that the lines above were chosen by; editing them changes nothing.",
            "evidence:",
            *(f"  {_flow(x.name)}: {_flow(x.evidence.as_values())}" for x in layers if x.evidence),
        ]
    return _HEADING + "\n".join(lines) + "\n"


def _line(layer: AssignedLayer, common: tuple[int | None, float | None] | None) -> str:
    own = {}
    if layer.train == LORA and (layer.r, layer.alpha) != common:
        own = {"r": layer.r, "alpha": layer.alpha}
    return _flow({"train": layer.train, **own, "shape": layer.shown})


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    check_installed("yaml", "An assignment as YAML")
    import yaml

    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse(text: str) -> Mapping[str, Any]:
    """Return the content of a file: patterns, or one entry per layer (`is_explicit`).

    Raises:
        ValueError: The text is no YAML, or no mapping.
    """
    check_installed("yaml", "An assignment as YAML")
    import yaml

    with reading_yaml():
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        twice = _given_twice(root)
        values = None if root is None else loader.construct_document(root)
    if twice is not None:
        # YAML would keep the last entry: a change of an earlier one would have no effect.
        line = twice.start_mark.line + 1
        raise ValueError(f"{twice.value!r} is given twice (line {line}). Leave one of the two out.")
    if not isinstance(values, Mapping):
        raise ValueError(
            "no assignment: must be a mapping, with `layers` or with patterns (full, lora, frozen)"
        )
    return values


def _given_twice(root: Any) -> Any:
    """Return the second key of one name in a mapping of a YAML tree; None without any."""
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue  # an alias, a scalar, or an empty document
        seen.add(id(node))
        names: set[str] = set()
        for entry in node.value:
            key, value = entry if isinstance(entry, tuple) else (None, entry)
            waiting.append(value)
            name = getattr(key, "value", None)
            if isinstance(name, str) and name in names:
                return key
            names |= {name} if isinstance(name, str) else set()
    return None


def from_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of an assignment from the content of a file with `layers`.

    Raises:
        ValueError: A key or value is not allowed; the message has the allowed ones.
    """
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown {unknown[0]!r}. Must be {', '.join(_KEYS)}.")
    flags = {name: values.get(name, False) for name in ("use_rslora", "freeze_rest")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"Invalid {name}={value!r}. Must be true or false.")
    common = values.get("lora") or {}
    if not isinstance(common, Mapping) or set(common) - {"r", "alpha"}:
        raise ValueError(f"Invalid lora={common!r}. Must be a mapping of r and alpha.")
    layers, evidence = values["layers"], values.get("evidence") or {}
    for name, given in (("layers", layers), ("evidence", evidence)):
        if not isinstance(given, Mapping):
            raise ValueError(f"Invalid {name}={given!r}. Must be a mapping with names of layers.")
    if not layers:
        raise ValueError("Invalid layers: empty. Must have one entry per layer.")
    if strange := [name for name in evidence if name not in layers]:
        raise ValueError(f"Invalid evidence: {strange[0]!r} is not in layers.")
    rest = values.get("frozen_rest") or []
    if not isinstance(rest, list) or not all(isinstance(name, str) for name in rest):
        raise ValueError(f"Invalid frozen_rest={rest!r}. Must be a list of names of parameters.")
    return {
        "entries": tuple(
            _layer(name, entry, common, evidence.get(name), use_rslora=flags["use_rslora"])
            for name, entry in layers.items()
        ),
        "frozen_rest": tuple(rest),
        **flags,
        **{name: str(values.get(name) or "") for name in ("model", "source")},
    }


def _layer(
    name: Any, entry: Any, common: Mapping[str, Any], evidence: Any, *, use_rslora: bool
) -> AssignedLayer:
    own = f"Layer {name}"
    if not isinstance(name, str):
        raise ValueError(f"Invalid layer {name!r}: a name must be text. Put it in quotes.")
    if not isinstance(entry, Mapping) or set(entry) - set(_LAYER_KEYS):
        raise ValueError(f"{own}: invalid {entry!r}. Must be a mapping of {_listed(_LAYER_KEYS)}.")
    if "train" not in entry:
        raise ValueError(f"{own} has no train. Must be {_listed(KINDS)}.")
    train, r, alpha = entry["train"], entry.get("r"), entry.get("alpha")
    if train == LORA:
        alpha = common.get("alpha") if alpha is None and r is None else alpha
        r = common.get("r") if r is None else r
        if r is None:
            raise ValueError(f"{own}: lora has no rank. Give r here, or in `lora`.")
        check_rank(r, 1 if alpha is None else alpha, own, is_lora=True)
        alpha = default_alpha(r, use_rslora=use_rslora) if alpha is None else float(alpha)
    return AssignedLayer(
        name=name,
        shape=_shape(own, entry.get("shape")),
        train=str(train),
        r=r,
        alpha=alpha,
        evidence=None if evidence is None else Evidence.of_values(evidence),
    )


def _shape(own: str, given: Any) -> tuple[int, int]:
    parts = str(given).split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{own}: invalid shape={given!r}. Must be OUTxIN, such as 64x128.")
    return int(parts[0]), int(parts[1])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
