"""Plant faults in the optimizer, one at a time, and check that the core tests catch each.

The faults are plausible mistakes of a programmer. Each is a small textual patch on a temporary copy
of `src/`.

    python scripts/planted_faults.py              # all faults, a few minutes
    python scripts/planted_faults.py NAME ...     # some of them
    python scripts/planted_faults.py --check      # only check that the patches apply

Exits with 1 if a fault survives or a patch no longer applies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "core"


class Fault(NamedTuple):
    """A fault to plant.

    Attributes:
        name: Description of the fault.
        tests: Test files, or node ids, under tests/core that should fail, quickest first.
        file: The file under src/molf/core that the edits change.
        edits: (old, new) pairs; each old text occurs exactly once.
        more: Edits of other files, as (file, old, new).
    """

    name: str
    tests: str
    file: str
    edits: list[tuple[str, str]]
    more: tuple[tuple[str, str, str], ...] = ()


UPDATE_OF_FACTORS = """        for _, A, B, dA, dB in moves:
            A += dA
            B += dB
"""
DECAY_OF_FULL = '        stacked_A, stacked_B = self.state["lora_A"], self.state["lora_B"]\n'

FAULTS = [
    Fault(
        "decay acts on W_eff instead of W",
        "test_golden.py",
        "folded.py",
        [("alpha * decay", "alpha * 0.0"),
         ("self._scalings * (decay / alpha)", "self._scalings * 0.0")],
    ),
    Fault(
        "an expert is taken for one without wins by its first row",
        "test_experts_without_wins.py",
        "factors.py",
        [("lora_B[:1, own].any() or lora_B[:, own].abs().sum()", "lora_B[:1, own].any()")],
    ),
    Fault(
        "experts that have moved are left out of the products",
        "test_experts_without_wins.py",
        "factors.py",
        [("live.append(own)\n    return live", "live.append(own)\n    return live[:1]")],
    ),
    Fault(
        "moments of another shape are stepped with",
        "test_torch_invariants.py",
        "dense.py",
        [("if x != values.shape), None)", "if x is None), None)")],
    ),
    Fault(
        "the fused kernel gets factors' moments of another shape",
        "test_torch_invariants.py",
        "one_pass.py",
        [("    _check_shapes(grad, exp_avg, exp_avg_sq)\n", "")],
    ),
    Fault(
        "sharded gradients are taken for whole ones",
        "test_torch_invariants.py",
        "guard.py",
        [('if hasattr(grad, "device_mesh"):', "if False:")],
    ),
    Fault(
        "bias left out of n_e",
        "test_golden.py",
        "routed.py",
        [("counts.insert(0, sum(tensor.parameter.numel() for tensor in self.dense))",
          "counts.insert(0, self.dense[0].parameter.numel())")],
    ),
    Fault(
        "eps inside the root of the score",
        "test_one_pass.py",
        "adam.py",
        [("exp_avg_sq.sqrt().add_(_SCORE_EPS)", "(exp_avg_sq + _SCORE_EPS).sqrt()")],
    ),
    Fault(
        "a direction is added to the one before",
        "test_one_pass.py",
        "one_pass.py",
        [("weight_decay=-1.0", "weight_decay=0.0")],
    ),
    Fault(
        "a descent moves the second moment",
        "test_one_pass.py",
        "one_pass.py",
        [("_LEAST_ROOT = 2.0**-14", "_LEAST_ROOT = 2.0**-11")],
    ),
    Fault(
        "a descent moves the first moment",
        "test_one_pass.py",
        "one_pass.py",
        [("_STILL = 2.0**-40", "_STILL = 2.0**-20")],
    ),
    Fault(
        "eps of a descent is not scaled as the fraction is",
        "test_one_pass.py",
        "one_pass.py",
        [("eps=eps * scale", "eps=eps")],
    ),
    Fault(
        "a whole step does not decay",
        "test_weight_rounding.py",
        "one_pass.py",
        [("weight_decay=weight_decay", "weight_decay=0.0")],
    ),
    Fault(
        "the optimizer's eps used in the score",
        "test_twin.py",
        "dense.py",
        [("        grad, moments = gradient(self.parameter), self._moments\n        return",
          '        adam._SCORE_EPS = self.group["eps"]\n'
          "        grad, moments = gradient(self.parameter), self._moments\n        return"),
         ("from molf.core.fidelity", "from molf.core import adam\nfrom molf.core.fidelity")],
    ),
    Fault(
        "bias correction in the score",
        "test_golden.py",
        "routed.py",
        [("for total, lr, count in zip(sums, lrs, counts, strict=True)\n        ]",
          "for total, lr, count in zip([x / (1 - self.group['betas'][0] ** (self.steps_taken + 1))"
          " for x in sums], lrs, counts, strict=True)\n        ]")],
    ),
    Fault(
        "rate missing in EPD",
        "test_golden.py",
        "adam.py",
        [('if score == "pfn" else lr * total / count', 'if score == "pfn" else total / count')],
    ),
    Fault(
        "score of an expert over the other's factors",
        "test_golden.py",
        "routed.py",
        [("decay, score).split(ranks)", "decay, score).flip(0).split(ranks)")],
    ),
    Fault(
        "ties go to the highest index",
        "test_method_config.py",
        "routing.py",
        [("(-scores[expert], expert)", "(-scores[expert], -expert)")],
    ),
    Fault(
        "random winners drawn from the global generator",
        "test_method_config.py",
        "routing.py",
        [('random.Random(f"{seed}/{layer}/{step}").sample(', "random.sample(")],
    ),
    Fault(
        "losers' moments not updated",
        "test_golden.py",
        "folded.py",
        [('group["params"], states))\n',
          'group["params"], states))\n'
          '        self.before = self.state["exp_avg"].clone()\n'),
         ("        for tensor in self.dense:\n            tensor.state[\"step\"] += 1\n",
          "        for tensor in self.dense:\n            tensor.state[\"step\"] += 1\n"
          '        if 0 not in winners:\n            self.state["exp_avg"].copy_(self.before)\n')],
    ),
    Fault(
        "losers' weights decay",
        "test_golden.py",
        "dense.py",
        [('        assert self._decay is not None, "moments move first"\n',
          '        assert self._decay is not None, "moments move first"\n'
          "        if step is None:\n"
          "            self._stored.read().mul_(self.adamw_step().kept)\n")],
    ),
    Fault(
        "stale A in the increment",
        "test_golden.py",
        "folded.py",
        [("right += [A + dA, dA]", "right += [A, dA]")],
    ),
    Fault(
        "increment formed as a difference of products",
        "test_precision.py",
        "folded.py",
        [("left += [_times(dB, scaling / alpha), _times(B, scaling / alpha)]",
          "left += [(B + dB) * (scaling / alpha), -B * (scaling / alpha)]"),
         ("right += [A + dA, dA]", "right += [A + dA, A]")],
    ),
    Fault(
        "several winners: full sees the others' new factors",
        "test_golden.py",
        "folded.py",
        [(UPDATE_OF_FACTORS, ""), (DECAY_OF_FULL, UPDATE_OF_FACTORS + DECAY_OF_FULL)],
    ),
    Fault(
        "LoRA rate not scaled by the schedule",
        "test_golden.py",
        "routed.py",
        [('self.group["lr"] * ratio', 'self.group.get("initial_lr", self.group["lr"]) * ratio')],
    ),
    Fault(
        "decay on biases",
        "test_golden.py",
        "folded.py",
        [('bias.adamw_step("bias_weight_decay")', 'bias.adamw_step("weight_decay")')],
    ),
    Fault(
        "bias corrected by the weight's counter",
        "test_twin.py",
        "folded.py",
        [('bias.adamw_step("bias_weight_decay")', 'weight.adamw_step("bias_weight_decay")')],
    ),
    Fault(
        "scaling missing in grad B",
        "test_golden.py",
        "folded.py",
        [("grad, A.t(), beta=0, alpha=alpha", "grad, A.t(), beta=0"),
         ("grad_B.mul_(scalings)", "grad_B")],
    ),
    Fault(
        "transposed layout ignored",
        "test_golden.py",
        "folded.py",
        [('return tensor.t() if group["transposed"] else tensor', "return tensor")],
    ),
    Fault(
        "low-precision weights rounded twice",
        "test_twin.py::test_bfloat16_weights_are_rounded_once_per_step",
        "dense.py",
        [("        step.descend_(values, *moments)",
          "        step.descend_(values.copy_(values.bfloat16()), *moments)")],
    ),
    Fault(
        "load_state_dict casts to the weight's dtype",
        "test_optimizer_state.py",
        "adamw.py",
        [("value.to(parameter.device, copy=True)", "value.to(parameter, copy=True)")],
    ),
    Fault(
        "loaded state shares the source's tensors",
        "test_optimizer_state.py",
        "adamw.py",
        [("value.to(parameter.device, copy=True)", "value.to(parameter.device)")],
    ),
    Fault(
        "no guard against non-finite gradients",
        "test_nonfinite.py",
        "step.py",
        [("if not all(map(fits, bounds)):", "if False:")],
    ),
    Fault(
        "a loss of NaN is no reason to refuse a step",
        "test_nonfinite.py",
        "guard.py",
        [("torch.where(number.detach().isfinite(), 0.0, torch.inf)", "torch.zeros(())")],
    ),
    Fault(
        "what one step requires holds for the next",
        "test_nonfinite.py",
        "unit_optimizer.py",
        [("required, self._required = self._required, {}", "required = self._required")],
    ),
    Fault(
        "the gradients of the factors are not guarded",
        "test_nonfinite.py",
        "folded.py",
        [('Guarded(weight, max(group["scalings"]), factors)', "Guarded(weight)")],
    ),
    Fault(
        "second moments of infinity",
        "test_nonfinite.py",
        "guard.py",
        [("return 0.5 * torch.finfo(dtype).max ** 0.5", "return torch.finfo(dtype).max"),
         ("return torch.dot(flat, flat).sqrt()", "return flat.double().norm()")],
    ),
    Fault(
        "a bad step reaches the moments",
        "test_nonfinite.py",
        "adam.py",
        [("torch.where(decay.finite, grad, 0.0).to(", "grad.to(")],
    ),
    Fault(
        "a CPU does not ask whether a step may happen",
        "test_nonfinite.py",
        "guard.py",
        [("self.refuses = self._is_known and not", "self.refuses = False and not")],
    ),
    Fault(
        "the kernel gets tensors that are not contiguous",
        "test_one_pass.py",
        "one_pass.py",
        [("        and tensor.is_contiguous()\n", "")],
    ),
    Fault(
        "a bad step decays the second moment",
        "test_nonfinite.py",
        "adam.py",
        [("torch.where(finite, kept, 1.0)", "kept")],
    ),
    Fault(
        "the host waits for every layer",
        "test_step_cost.py",
        "step.py",
        [("part.to(home) for", "part.cpu().to(home) for")],
    ),
    Fault(
        "reduced-precision products allowed",
        "test_precision.py",
        "precision.py",
        [('torch.set_float32_matmul_precision("highest")', "pass")],
    ),
    Fault(
        "autocast reaches the products",
        "test_precision.py",
        "precision.py",
        [("torch.autocast(device_type, enabled=False)", "torch.no_grad()")],
    ),
    Fault(
        "all layers start from the same A",
        "test_factors.py",
        "factors.py",
        [("{layer}/{index}", "{index}")],
    ),
    Fault(
        "a tied head is routed",
        "test_layers.py",
        "layers.py",
        [("        if others:", "        if False:")],
    ),
    Fault(
        "c_i forgotten in the gradient of B",
        "test_adapter_golden.py",
        "adapter.py",
        [("return grad_A, grad_B * _columns_scale(self.group, grad_B)", "return grad_A, grad_B")],
    ),
    Fault(
        "c_i forgotten in the step of B",
        "test_adapter_golden.py",
        "adapter.py",
        [("*moments, scale=scale)", "*moments)")],
    ),
    Fault(
        "c_i the wrong way round",
        "test_adapter_golden.py",
        "adapter.py",
        [('scaling / group["adapter_scaling"] for', 'group["adapter_scaling"] / scaling for')],
    ),
    Fault(
        "c_i in the decay of B",
        "test_adapter_golden.py",
        "adapter.py",
        [("values.mul_(step.kept)", "values.mul_(1 - step.decay * scale)")],
    ),
    Fault(
        "c_i forgotten when factors are read",
        "test_adapter_golden.py",
        "adapter.py",
        [("lora_B / _columns_scale(group, lora_B))", "lora_B)")],
    ),
    Fault(
        "slices as if all ranks were the first",
        "test_adapter_twin.py",
        "factors.py",
        [("start = sum(ranks[:index])", "start = ranks[0] * index")],
    ),
    Fault(
        "the winner's slice is the next expert's",
        "test_adapter_golden.py",
        "routed.py",
        [("[w - self.has_full for", "[w - 1 for")],
    ),
    Fault(
        "a frozen base has a full expert",
        "test_adapter_twin.py",
        "routed.py",
        [("has_full=self.has_full", "has_full=True")],
    ),
    Fault(
        "explicit form: the bias decays and the weight does not",
        "test_adapter_golden.py",
        "adapter.py",
        [('("weight_decay", "bias_weight_decay")', '("bias_weight_decay", "weight_decay")')],
    ),
    Fault(
        "moments in the adapter's own dtype",
        "test_adapter_twin.py::test_bfloat16_factors_are_rounded_once_per_step",
        "moments.py",
        [("zeros_like(parameter, dtype=compute_dtype(parameter))", "zeros_like(parameter)")],
    ),
    Fault(
        "the gradient of B is not guarded",
        "test_adapter_state.py",
        "adapter.py",
        [(", Guarded(lora_B, max(stored_scales(group)))]", "]")],
    ),
    Fault(
        "the adapter starts as PEFT draws it",
        "test_adapter_form.py",
        "peft_model.py",
        [("layer.A[1].copy_(drawn)", "pass")],
    ),
    Fault(
        "what is not trained is left trainable",
        "test_adapter_form.py",
        "optimizer.py",
        [("                parameter.requires_grad_(False)", "                pass")],
    ),
    Fault(
        "the low half is not written back",
        "test_weight_rounding.py",
        "storage.py",
        [("            self._state[LOW][rows].copy_(low)\n", "")],
    ),
    Fault(
        "the low half has the wrong sign",
        "test_weight_rounding.py",
        "storage.py",
        [("return join_float32(high, torch.where(", "return join_float32(high, -torch.where(")],
    ),
    Fault(
        "a low half below zero itself makes a NaN",
        "test_weight_rounding.py",
        "storage.py",
        [("torch.where(high == 0, low.clamp(min=0), low)", "low")],
    ),
    Fault(
        "stochastic draws repeat in every step",
        "test_weight_rounding.py",
        "storage.py",
        [('self.name, self._state["step"])', "self.name, 0)")],
    ),
    Fault(
        "stochastic draws are the same for every parameter",
        "test_weight_rounding.py",
        "storage.py",
        [('RoundingKey.of(self._seed, self.name, ', 'RoundingKey.of(self._seed, "", ')],
    ),
    Fault(
        "stochastic draws repeat in every block",
        "test_weight_rounding.py",
        "storage.py",
        [("round_stochastic(values, self.step_key(), first)",
          "round_stochastic(values, self.step_key(), 0)")],
    ),
    Fault(
        "None rounds bfloat16 weights to nearest",
        "test_weight_rounding.py",
        "storage.py",
        [('weight_rounding or "exact"', 'weight_rounding or "nearest"')],
    ),
    Fault(
        "lost updates are counted among all elements",
        "test_fidelity.py",
        "fidelity.py",
        [("            is_update.sum(),", "            torch.ones_like(is_update).sum(),")],
    ),
    Fault(
        "8-bit second moments are stored as zero",
        "test_8bit.py",
        "moments.py",
        [("    if not block.signed:", "    if False:")],
    ),
    Fault(
        "8-bit moments of losers stay",
        "test_8bit.py",
        "dense.py",
        [("        if step is None and product is None and self._moments.is_settled:",
          "        if step is None:")],
    ),
    Fault(
        "8-bit scales of the wrong blocks",
        "test_8bit.py",
        "moments.py",
        [("slice(rows.start * self._row // _BLOCK, rows.stop * self._row // _BLOCK)",
          "slice(0, (rows.stop - rows.start) * self._row // _BLOCK)")],
    ),
    Fault(
        "in the backward pass, layers do not wait for their bias",
        "test_in_backward.py",
        "in_backward.py",
        [("if len(ready) == sum(member.requires_grad for member in members):", "if ready:")],
    ),
    Fault(
        "in the backward pass, a step that raises leaves the pass open",
        "test_in_backward.py",
        "in_backward.py",
        [("        finally:\n            self.close()\n        self.watch()",
          "        finally:\n            pass\n        self.close()\n        self.watch()")],
    ),
    Fault(
        "hooks keep the optimizer alive",
        "test_in_backward.py",
        "in_backward.py",
        [("self._optimizer = weakref.ref(optimizer)", "self._optimizer = lambda: optimizer"),
         ("mine = weakref.ref(self)\n\n        def", "mine = lambda: self\n\n        def")],
    ),
    Fault(
        "several processes are asked about in the constructor alone",
        "test_in_backward.py",
        "unit_optimizer.py",
        [("        self._check_processes()\n        self._tally", "        self._tally")],
    ),
    Fault(
        "AdamW's moments are loaded in the weight's dtype",
        "test_optimizer_state.py",
        "loading.py",
        [("else x.to(dtype)", "else x")],
    ),
    Fault(
        "names of loaded parameters do not matter",
        "test_optimizer_state.py",
        "loading.py",
        [("if _without_adapter(name) != _without_adapter(expected):", "if False:")],
    ),
    Fault(
        "every block is sampled for lost updates",
        "test_fidelity.py",
        "fidelity.py",
        [("-start % _every(tensor)", "0")],
    ),
    Fault(
        "in the backward pass, gradients are kept",
        "test_in_backward.py",
        "adamw.py",
        [("            parameter.grad = None", "            pass")],
    ),
    Fault(
        "in the backward pass, the threads of several devices step at once",
        "test_in_backward.py",
        "in_backward.py",
        [("with steps._turn:", "with threading.RLock():")],
    ),
    Fault(
        "an offloaded state is fetched ahead while it is used",
        "test_offload.py",
        "offload.py",
        [(" and not _overlap(follower, parameters)", "")],
    ),
    Fault(
        "offloaded states stay on the device where zero_grad ends the backward pass",
        "test_offload.py",
        "unit_optimizer.py",
        [("            self._backward.close()\n            self._end_step()\n",
          "            self._backward.close()\n")],
    ),
    Fault(
        "a bad gradient leaves offloaded states on their way",
        "test_offload.py",
        "unit_optimizer.py",
        [("            self._settled_state()  # the caller may catch the error and read it\n", "")],
    ),
    Fault(
        "an offloaded state is fetched while it is on its way back",
        "test_offload.py",
        "offload.py",
        [("        while self._going:\n", "        while len(self._going) > 1:\n")],
    ),
    Fault(
        "an offloaded state is used before it has come",
        "test_offload.py",
        "offload.py",
        [("        loan.wait()\n        follower", "        follower")],
    ),
    Fault(
        "an offloaded state never leaves the device",
        "test_offload.py",
        "offload.py",
        [("            own.update({**lent, **kept})", "            own.update(lent)")],
    ),
    Fault(
        "offloaded layers move before all gradients are checked",
        "test_offload.py",
        "adamw.py",
        [("        if len(parts) > 1:\n", "        if len(parts) < 1:\n")],
    ),
    Fault(
        "offloaded layers are checked without their factors",
        "test_offload.py",
        "adamw.py",
        [("self._gradients(group))", "map(Guarded, group['params']))")],
    ),
    Fault(
        "merged in the weight's own dtype",
        "test_merge.py",
        "merge.py",
        [("parameter.data = parameter.data.float()", "pass")],
    ),
    Fault(
        "merged into the dequantised weights whatever was asked for",
        "test_merge.py",
        "merge.py",
        [("start = trained if source is None else weight.to(trained.dtype)", "start = trained")],
    ),
]  # fmt: skip


class PatchError(Exception):
    """A patch does not apply to the present code."""


def plant(fault: Fault, source: Path) -> None:
    """Change the copy of `src/` at `source`.

    Raises:
        PatchError: A text to replace does not occur exactly once, or the result does not parse.
    """
    edits = [(fault.file, old, new) for old, new in fault.edits] + list(fault.more)
    for file, old, new in edits:
        path = source / "molf" / "core" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise PatchError(f"{file}: occurs {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
        path.write_text(text)
    for file in {file for file, _, _ in edits}:
        path = source / "molf" / "core" / file
        try:
            compile(path.read_text(), path, "exec")
        except SyntaxError as error:
            raise PatchError(f"{file}: does not parse: {error}") from None


def copy_source(folder: str) -> Path:
    """Copy `src/` into a folder; return the copy."""
    source = Path(folder) / "src"
    shutil.copytree(
        ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    return source


def run_tests(tests: str, source: Path) -> tuple[bool, str]:
    """Run tests against a copy of `src/`; return whether they pass, and the first that fails.

    Raises:
        PatchError: The tests did not run, so they caught nothing.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "--tb=no", "--no-header"]
    command += ["-p", "no:cacheprovider", "--hypothesis-profile=no-shrink"]
    command += [str(TESTS / test) for test in tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise PatchError(f"pytest exits with {done.returncode}: {done.stdout[-800:]}{done.stderr}")
    failed = re.search(r"^FAILED \S*?([\w.]+::\S+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, failed[1] if failed else ""


def try_fault(fault: Fault) -> str:
    """Plant one fault; return the test that caught it, or an empty text."""
    with tempfile.TemporaryDirectory() as folder:
        source = copy_source(folder)
        plant(fault, source)
        passed, test = run_tests(fault.tests, source)
        return "" if passed else test


def check_harness(faults: list[Fault]) -> None:
    """Check that the tests import the copy, and that they pass without a fault.

    Raises:
        PatchError: The tests import another copy, or fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = copy_source(folder)
        where = subprocess.run(
            [sys.executable, "-c", "import molf; print(molf.__file__)"],
            env={**os.environ, "PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not where.startswith(folder):
            raise PatchError(f"the tests would import {where.strip()} instead of the copy")
        files = dict.fromkeys(test for fault in faults for test in fault.tests.split())
        passed, failed = run_tests(" ".join(files), source)
        if not passed:
            raise PatchError(f"without any fault, {failed} fails")


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Plant faults and check that tests catch them.")
    parser.add_argument("names", nargs="*", help="faults to plant (default: all)")
    parser.add_argument("--check", action="store_true", help="only check that the patches apply")
    options = parser.parse_args()
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not options.names or fault.name in options.names]

    wrong = 0
    if not options.check:
        check_harness(faults)
    print(f"{'fault':55} caught by")
    for fault in faults:
        started = time.perf_counter()
        try:
            if options.check:
                with tempfile.TemporaryDirectory() as folder:
                    plant(fault, copy_source(folder))
                result = "(applies)"
            else:
                result = try_fault(fault) or "NOTHING: IT SURVIVES"
        except PatchError as error:
            result = f"PATCH FAILS: {error}"
        wrong += result.startswith(("NOTHING", "PATCH"))
        print(f"{fault.name:55} {result}  [{time.perf_counter() - started:.1f} s]", flush=True)
    print(f"{len(faults) - wrong} of {len(faults)} faults are as expected.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
