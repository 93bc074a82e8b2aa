"""Every variant of every kernel that the scenarios launch, compiled for sm_90 without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import triton
from scenarios import run_everything
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from molf.core.execute.triton import Kernels, elementwise, low_rank

POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Recorder(Kernels):
    """Notes what would be launched: kernel, types of its arguments, constants."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._tables = {}
        self.launched: dict[tuple, tuple] = {}

    def _launch(self, kernel, grid, arguments, constants) -> None:
        types = tuple(POINTERS[argument.dtype] for argument in arguments)
        name = f"{kernel.__name__} {' '.join(f'{k}={v}' for k, v in constants.items())}"
        self.launched[name, types] = kernel, types, constants


def launched() -> list:
    recorder = Recorder()
    run_everything(recorder, recorder.device)
    return [pytest.param(*launch, id=name) for (name, _), launch in recorder.launched.items()]


LAUNCHED = launched()


@pytest.mark.parametrize(("kernel", "types", "constants"), LAUNCHED)
def test_compiles_for_sm_90(kernel, types, constants):
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    # As in a launch: torch's allocations start at multiples of 16 bytes.
    attributes = {(position,): [["tt.divisibility", 16]] for position in range(len(types))}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    ptx = compiled.asm["ptx"]
    assert re.search(r"^\.target sm_90", ptx, re.M)
    assert len(compiled.asm["cubin"]) > 1000  # ptxas comes with triton
    # Arithmetic is that of torch: no TF32, no approximate root or quotient, subnormals kept.
    inexact = re.findall(r"tf32|sqrt\.approx\S*|div\.(?:full|approx)\S*|\.ftz", ptx)
    assert not inexact
    vectors = re.findall(r"(?:ld|st)\.global[.\w]*\.v[248]", ptx)
    if "ALIGNED" in constants:
        assert bool(vectors) == constants["ALIGNED"]


def test_no_kernel_is_left_out():
    kernels = {
        value
        for module in (elementwise, low_rank)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert {param.values[0] for param in LAUNCHED} == kernels
    assert len(kernels) == 6


def test_no_atomics():
    """They would make sums depend on which block comes first."""
    for module in (elementwise, low_rank):
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                assert "atomic" not in value.src


def test_kernels_are_not_run_on_the_cpu_without_the_interpreter():
    with pytest.raises(ValueError, match=r"Invalid device cpu .* Must be a CUDA device"):
        Kernels(torch.device("cpu"))
