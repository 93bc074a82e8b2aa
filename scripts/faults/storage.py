"""Faults in the arithmetic of blocks, in precision, in stored weights and moments, in loading."""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor

from faults.planting import fault

# -- one pass -----------------------------------------------------------------------------------


@fault("a direction is added to the one before", "test_one_pass.py", "move")
def _(move):
    def added(grad, exp_avg, exp_avg_sq, betas, eps, scratch):
        before = scratch.take(exp_avg.numel()).clone().view(exp_avg.shape)
        return move(grad, exp_avg, exp_avg_sq, betas, eps, scratch).add_(before)

    return added


@fault("a descent moves the second moment", "test_one_pass.py", "_LEAST_ROOT")
def _(least_root):
    return 2.0**-11


@fault("a descent moves the first moment", "test_one_pass.py", "_STILL")
def _(still):
    return 2.0**-20


@fault("eps of a descent is not scaled as the fraction is", "test_one_pass.py",
       "descend", "_LEAST_ROOT")  # fmt: skip
def _(descend, least_root):
    def unscaled(*tensors, step_size, correction, eps):
        scale = 2.0 ** math.frexp(correction)[1] / (2 * least_root)
        descend(*tensors, step_size=step_size, correction=correction, eps=eps / scale)

    return unscaled, least_root


@fault("a whole step does not decay", "test_weight_rounding.py", "Scratch:adamw")
def _(adamw):
    return lambda *tensors, **numbers: adamw(*tensors, **{**numbers, "weight_decay": 0.0})


@fault("the kernel gets tensors that are not contiguous", "test_one_pass.py", "Scratch:fits")
def _(fits):
    return lambda *tensors: fits(*(one.detach().contiguous() for one in tensors))


@fault("the fused kernel gets factors' moments of another shape", "test_torch_invariants.py",
       "Scratch:_check_shapes")  # fmt: skip
def _(check):
    return lambda *tensors: None


@fault("moments of another shape are stepped with", "test_torch_invariants.py",
       "DenseTensor.__init__")  # fmt: skip
def _(init):
    def unchecked(self, *args, **options):
        with suppress(RuntimeError):  # the check is the last line
            init(self, *args, **options)

    return unchecked


# -- precision ----------------------------------------------------------------------------------


@fault("reduced-precision products allowed", "test_precision.py", "full_precision")
def _(full_precision):
    @contextmanager
    def without_autocast(device_types):
        with ExitStack() as stack:
            for device_type in device_types:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield

    return without_autocast


@fault("autocast reaches the products", "test_precision.py", "full_precision")
def _(full_precision):
    return lambda device_types: full_precision(())


# -- stored weights -----------------------------------------------------------------------------


@fault("low-precision weights rounded twice",
       "test_twin.py::test_bfloat16_weights_are_rounded_once_per_step",
       "AdamWStep.descend_")  # fmt: skip
def _(descend):
    def rounded(self, values, *moments, **options):
        descend(self, values.copy_(values.bfloat16()), *moments, **options)

    return rounded


@fault("the low half is not written back", "test_weight_rounding.py", "StoredWeight.write")
def _(write):
    def high_alone(self, rows, values):
        before = self.low.clone() if self.low is not None else None
        write(self, rows, values)
        if before is not None:
            self.low.copy_(before)

    return high_alone


@fault("the low half has the wrong sign", "test_weight_rounding.py", "_joined")
def _(joined):
    return lambda high, low: joined(high, -low)


@fault("a low half below zero itself makes a NaN", "test_weight_rounding.py", "_joined",
       "join_float32")  # fmt: skip
def _(joined, join_float32):
    return (lambda high, low: join_float32(high.resolve_neg(), low)), join_float32


@fault("stochastic draws repeat in every step", "test_weight_rounding.py", "RoundingKey.of")
def _(of):
    return classmethod(lambda cls, seed, name, step: of.__func__(cls, seed, name, 0))


@fault("stochastic draws are the same for every parameter", "test_weight_rounding.py",
       "RoundingKey.of")  # fmt: skip
def _(of):
    return classmethod(lambda cls, seed, name, step: of.__func__(cls, seed, "", step))


@fault("stochastic draws repeat in every block", "test_weight_rounding.py",
       "StoredWeight.first_index")  # fmt: skip
def _(first_index):
    return lambda self, rows=...: 0


@fault("None rounds bfloat16 weights to nearest", "test_weight_rounding.py", "rounding_of")
def _(rounding_of):
    return lambda parameter, rounding: rounding_of(parameter, rounding or "nearest")


@fault("lost updates are counted among all elements", "test_fidelity.py", "UpdateTally.add")
def _(add):
    def all_elements(self, before, intended, after, *, weight=1.0):
        add(self, before, intended, after, weight=weight)
        self._sums[-1][0] = before.numel() * weight

    return all_elements


@fault("every block is sampled for lost updates", "test_fidelity.py", "UpdateTally.sample")
def _(sample):
    return staticmethod(lambda tensor, rows=...: sample.__func__(tensor))


# -- moments ------------------------------------------------------------------------------------


@fault("moments in the adapter's own dtype",
       "test_adapter_twin.py::test_bfloat16_factors_are_rounded_once_per_step",
       "moment_state")  # fmt: skip
def _(moment_state):
    def own_dtype(parameter, *args, **options):
        made = moment_state(parameter, *args, **options)
        for key in ("exp_avg", "exp_avg_sq"):
            if key in made:
                made[key] = made[key].to(parameter.dtype)
        return made

    return own_dtype


@fault("8-bit second moments are stored as zero", "test_8bit.py", "_store", "_middles")
def _(store, middles):
    def nearest(block, values):
        scaled = values.view(block.scale.numel(), -1)
        scale = scaled.abs().amax(-1).clip(1e-12)
        numbers = middles(block.signed, values.device)
        codes = torch.bucketize(scaled / scale[:, None], numbers, right=True, out_int32=True)
        block.codes.copy_(codes.view(values.shape))
        block.scale.copy_(scale)

    return nearest, middles


@fault("8-bit moments of losers stay", "test_8bit.py", "Eager._write_tensor")
def _(write_tensor):
    def winners_alone(self, write, *args, **options):
        if write.step is not None or write.product is not None:
            write_tensor(self, write, *args, **options)

    return winners_alone


@fault("8-bit scales of the wrong blocks", "test_8bit.py", "EightBitMoments._blocks",
       "_as_torchao")  # fmt: skip
def _(blocks, as_torchao):
    def first(self, rows):
        count = len(self._codes[0][rows])
        parts = zip(self._codes, self._scales, (True, False), strict=True)
        return [as_torchao(codes[rows], scales[:count], sign) for codes, scales, sign in parts]

    return first, as_torchao


# -- steps that are refused ---------------------------------------------------------------------


@fault("sharded gradients are taken for whole ones", "test_torch_invariants.py", "unusable")
def _(unusable):
    def unsharded(parameter):
        reason = unusable(parameter)
        return None if reason and "sharded" in reason else reason

    return unsharded


@fault("no guard against non-finite gradients", "test_nonfinite.py", "Guarded:fits")
def _(fits):
    return lambda bound: True


@fault("a loss of NaN is no reason to refuse a step", "test_nonfinite.py", "bound_of")
def _(bound_of):
    return lambda number: torch.zeros_like(number)


@fault("the gradients of the factors are not guarded", "test_nonfinite.py",
       "FoldedLayer.gradients_of")  # fmt: skip
def _(gradients_of):
    def alone(cls, group, states):
        found = gradients_of.__func__(cls, group, states)
        return [one._replace(scale=1.0, factors=()) for one in found]

    return classmethod(alone)


@fault("the gradient of B is not guarded",
       "test_invariants.py::test_a_bad_gradient_writes_nothing",
       "AdapterLayer.gradients_of")  # fmt: skip
def _(gradients_of):
    return classmethod(lambda cls, *args: gradients_of.__func__(cls, *args)[:-1])


@fault("second moments of infinity", "test_nonfinite.py", "largest_square", "Eager._squares")
def _(largest_square, squares):
    def of_elements(dtype):
        largest = torch.finfo(dtype).max
        return largest**2 if dtype == torch.float32 else largest

    return of_elements, lambda self, tensor, dtype: tensor.double().square().sum()


@fault("a bad step reaches the moments", "test_nonfinite.py", "update_and_score")
def _(update_and_score):
    def unchecked(grad, exp_avg, exp_avg_sq, decay, terms, **how):
        decay = dataclasses.replace(decay, finite=torch.ones_like(decay.finite))
        return update_and_score(grad, exp_avg, exp_avg_sq, decay, terms, **how)

    return unchecked


@fault("a bad step decays the second moment", "test_nonfinite.py", "MomentDecay.of")
def _(of):
    def decayed(cls, betas, *args, **options):
        made = of.__func__(cls, betas, *args, **options)
        return dataclasses.replace(made, kept_sq=torch.full_like(made.kept_sq, betas[1]))

    return classmethod(decayed)


@fault("a CPU does not ask whether a step may happen", "test_nonfinite.py", "FiniteGuard.__init__")
def _(init):
    def unasked(self, *args, **options):
        init(self, *args, **options)
        self.refuses = False

    return unasked


@fault("the host waits for every layer", "test_step_cost.py", "Eager._update_layer")
def _(update_layer):
    def waiting(self, *args):
        for expert, part, sums in update_layer(self, *args):
            sums[0].item()
            yield expert, part, sums

    return waiting


# -- loading ------------------------------------------------------------------------------------


@fault("load_state_dict casts to the weight's dtype", "test_optimizer_state.py",
       "restore_tensors")  # fmt: skip
def _(restore):
    def cast(states, parameter, values, keep):
        used = restore(states, parameter, values, keep)
        for key, value in states.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                states[parameter][key] = value.to(parameter.dtype)
        return used

    return cast


@fault("loaded state shares the source's tensors",
       "test_invariants.py::test_a_saved_state_resumes_with_the_same_bits",
       "restore_tensors")  # fmt: skip
def _(restore):
    return lambda states, parameter, values, keep: restore(
        states, parameter, values, lambda parameter, key, value: value
    )


@fault(
    "AdamW's moments are loaded in the weight's dtype", "test_optimizer_state.py", "convert_state"
)
def _(convert_state):
    def unconverted(state, *args):
        kept = {k: v for k, v in state.items() if k in ("exp_avg", "exp_avg_sq")}
        return {**convert_state(state, *args), **kept}

    return unconverted


@fault("names of loaded parameters do not matter", "test_optimizer_state.py", "_without_adapter")
def _(without_adapter):
    return lambda name: ""
