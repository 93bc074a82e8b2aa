"""kernels="triton": what is refused, and that nothing else needs triton."""

from __future__ import annotations

import importlib.util
import logging
import warnings

import pytest
import torch
from torch import nn

import molf
from core_helpers import run, tiny_model, tiny_optimizer
from molf import AdamW, MoLFAdamW, MoLFConfig

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra `triton`)"
)


@pytest.mark.parametrize("kernels", [None, "eager"])
def test_eager_is_the_default_and_says_so(kernels, caplog):
    with caplog.at_level(logging.INFO, logger="molf"):
        model = tiny_model()
        optimizer = tiny_optimizer(model, kernels=kernels)
        run(model, optimizer, [0, 1])
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["MoLFAdamW takes its steps with eager torch operations."]
    assert optimizer.kernels == "eager"


def test_an_unknown_word():
    with pytest.raises(ValueError, match=r"Invalid kernels='cuda'. Must be 'eager', 'triton' or"):
        AdamW([nn.Parameter(torch.ones(2))], kernels="cuda")


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("molf.core.options.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'molf\[triton\]' .*leave kernels"):
        AdamW([nn.Parameter(torch.ones(2))], kernels="triton")


@needs_triton
@pytest.mark.parametrize("build", ["adamw", "from_model", "factory"])
def test_a_cpu_is_refused_by_name(build):
    factory, options = molf.trainer_optimizer(MoLFConfig(ranks=(1,)), lr=1e-3, kernels="triton")
    builds = {
        "adamw": lambda model: AdamW(model.named_parameters(), kernels="triton"),
        "from_model": lambda model: tiny_optimizer(model, kernels="triton"),
        "factory": lambda model: factory()(model, **options),
    }
    with pytest.raises(ValueError, match=r"needs CUDA, and (embed|up).weight is on cpu\. Move"):
        builds[build](tiny_model())


@needs_triton
def test_float64_and_float16_are_refused():
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=rf"float32 and bfloat16 weights, and .* is {dtype}"):
            AdamW([nn.Parameter(torch.ones(2, dtype=dtype))], kernels="triton")


@needs_triton
def test_8bit_states_are_refused():
    pytest.importorskip("torchao")
    parameter = nn.Parameter(torch.ones(64, 64))
    with pytest.raises(ValueError, match=r"not possible with state_dtype='8bit': .* Leave one"):
        AdamW([parameter], kernels="triton", state_dtype="8bit")


@needs_triton
@pytest.mark.parametrize("freeze", [True, False])
def test_the_adapter_form_is_refused(freeze):
    config = MoLFConfig(ranks=(2, 3), freeze_base=freeze, target_modules=["up", "down"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = molf.with_adapter(tiny_model(), config)
        with pytest.raises(ValueError, match=r"does not support LoRA experts in a PEFT adapter"):
            MoLFAdamW.from_model(model, config, kernels="triton")


@needs_triton
@pytest.mark.parametrize(
    ("device", "layout", "message"),
    [
        ("meta", None, r"one device, and parameter \[0\] of group 0 is on cpu while"),
        ("cpu", torch.channels_last, r"contiguous weights, and parameter \[0\] of group 0 of"),
    ],
)
def test_devices_and_layouts_are_refused(device, layout, message, monkeypatch):
    from molf.core.execute import kernel_checks as kernels

    monkeypatch.setattr("molf.core.execute.triton.kernels.is_interpreted", lambda: True)
    values = torch.ones(2, 3, 4, 5)
    parameter = nn.Parameter(values if layout is None else values.to(memory_format=layout))
    group = {"params": [parameter], "layer": None, "state_dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        kernels.check_kernel_group(group, 0, torch.device(device))
