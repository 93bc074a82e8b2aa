"""Faults in the method: gradients, moments, scores, winners, the writes of each form, factors."""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
import math
import random
import sys

import torch

from faults.planting import fault
from molf.core.scores.score import Block

# -- scores and winners -------------------------------------------------------------------------


@fault("bias left out of n_e", "test_golden.py", "Expert.size")
def _(size):
    return property(lambda self: sum(part.size for part in self.parts if part.name != "bias"))


@fault("eps inside the root of the score", "test_one_pass.py", "Block.direction")
def _(direction):
    return property(lambda self: self.exp_avg / (self.exp_avg_sq + 1e-8).sqrt())


@fault(
    "the optimizer's eps used in the score",
    "test_twin.py",
    "Eager._update_layer",
    "update_and_score",
)
def _(update_layer, update):
    def with_eps(self, layer, *args):
        for values in (update.__globals__, vars(sys.modules[Block.__module__])):
            values["SCORE_EPS"] = layer.group["eps"]
        yield from update_layer(self, layer, *args)

    return with_eps, update


@fault("bias correction in the score", "test_golden.py", "RoutedLayer.candidates")
def _(candidates):
    def corrected(self, sums):
        correction = 1 - self.group["betas"][0] ** (self.steps_taken + 1)
        return candidates(self, {key: total / correction for key, total in sums.items()})

    return corrected


@fault("rate missing in EPD", "test_golden.py", "RoutedLayer._value")
def _(value):
    return lambda self, score, expert: value(self, score, expert._replace(lr=1.0))


@fault("score of an expert over the other's factors", "test_golden.py", "update_and_score")
def _(update_and_score):
    def turned(*args, by_column=False):
        sums = update_and_score(*args, by_column=by_column)
        return [one.flip(0) for one in sums] if by_column else sums

    return turned


@fault("ties go to the highest index", "test_method_config.py", "Candidates._highest")
def _(highest):
    def turned(self, eligible, count):
        best_first = sorted(eligible, key=lambda expert: (-self.scores[expert], -expert))
        return tuple(sorted(best_first[:count]))

    return turned


@fault("random winners drawn from the global generator", "test_method_config.py", "Candidates.draw")
def _(draw):
    return lambda self: random


@fault("a frozen base has a full expert", "test_scores.py", "RoutedLayer.candidates")
def _(candidates):
    return lambda self, sums: dataclasses.replace(candidates(self, sums), has_full=True)


@fault("one draw for all layers", "test_scores.py", "Candidates.draw")
def _(draw):
    return lambda self: random.Random(f"{self.seed}/{self.step}")


@fault("shuffled winners keep their layers", "test_scores.py", "Shuffled.choose")
def _(choose):
    return lambda self, layers: [layer.best for layer in layers]


@fault("share counts layers where full leads least", "test_scores.py", "Candidates.margin")
def _(margin):
    return property(lambda self: -margin.fget(self))


@fault("an average of a score is not kept", "test_scores.py", "RoutedLayer._value")
def _(value):
    def forgotten(self, score, expert):
        before = dict(self.kept)
        found = value(self, score, expert)
        for key in self.kept.keys() - before.keys():
            del self.kept[key]
        return found

    return forgotten


@fault("fresh descent from moments after the update", "test_twin.py", "update_and_score")
def _(update):
    def after(grad, exp_avg, exp_avg_sq, decay, terms, **how):
        late = [dataclasses.replace(term, is_before=False) for term in terms]
        return update(grad, exp_avg, exp_avg_sq, decay, late, **how)

    return after


@fault("the winner's slice is the next expert's", "test_adapter_golden.py",
       "RoutedLayer._lora_winners")  # fmt: skip
def _(lora_winners):
    return lambda self, winners: [w - 1 for w in winners if w >= self.has_full]


@fault("LoRA rate not scaled by the schedule", "test_golden.py", "RoutedLayer.lora_lrs")
def _(lora_lrs):
    def unscheduled(self):
        lr = self.group.get("initial_lr", self.group["lr"])
        return tuple(lr * ratio for ratio in self.group["lora_lr_ratios"])

    return property(unscheduled)


# -- the folded form ----------------------------------------------------------------------------


@fault("decay acts on W_eff instead of W", "test_golden.py", "FoldedLayer._product")
def _(product):
    return lambda self, won, decay: product(self, won, 0.0)


@fault("losers' moments not updated", "test_golden.py", "RoutedLayer.__init__",
       "FoldedLayer.writes")  # fmt: skip
def _(init, writes):
    def remember(self, *args, **options):
        init(self, *args, **options)
        self.before = self.state["exp_avg"].clone()

    def restore(self, winners):
        if 0 not in winners:
            self.state["exp_avg"].copy_(self.before)
        return writes(self, winners)

    return remember, restore


@fault("losers' weights decay", "test_golden.py", "FoldedLayer.writes")
def _(writes):
    def decayed(self, winners):
        found = writes(self, winners)
        for write in found.tensors:
            if write.step is None:
                write.tensor.stored.read().mul_(write.tensor.adamw_step().kept)
        return found

    return decayed


@fault("stale A in the increment", "test_golden.py", "FoldedLayer._factor_writes")
def _(factor_writes):
    def stale(self, index, of_A, of_B):
        return factor_writes(self, index, (of_A[0]._replace(increment=0.0), of_A[1]), of_B)

    return stale


@fault("increment formed as a difference of products", "test_precision.py",
       "FoldedLayer._factor_writes")  # fmt: skip
def _(factor_writes):
    def difference(self, index, of_A, of_B):
        share = of_B[0].increment
        of_A = of_A[0], of_A[1]._replace(old=1.0, increment=0.0)
        of_B = of_B[0]._replace(old=share), of_B[1]._replace(old=-share, increment=0.0)
        return factor_writes(self, index, of_A, of_B)  # (B + dB) (A + dA) - B A

    return difference


@fault("several winners: full sees the others' new factors", "test_golden.py",
       "FoldedLayer.writes", "_oriented")  # fmt: skip
def _(writes, oriented):
    def later(self, winners):
        found = writes(self, winners)
        decay = self.dense[0].adamw_step().decay if 0 in winners else 0.0
        won = self._lora_winners(winners)
        for index, A, B in zip(won, found.factors[::2], found.factors[1::2], strict=True):
            new_A, new_B = (
                one.values + one.step.increment(one.values, one.exp_avg, one.exp_avg_sq)
                for one in (A, B)
            )
            difference = new_B @ new_A - B.values @ A.values
            change = decay * self.group["scalings"][index] * difference
            oriented(self.weight.detach(), self.group).add_(change)
        return found

    return later, oriented


@fault("decay on biases", "test_golden.py", "DenseTensor.adamw_step")
def _(adamw_step):
    return lambda self, weight_decay="weight_decay": adamw_step(self)


@fault("bias corrected by the weight's counter", "test_twin.py", "FoldedLayer.writes")
def _(writes):
    def corrected(self, winners):
        found = writes(self, winners)
        weight, *biases = found.tensors
        counter = weight.tensor.state["step"]
        biases = [
            one._replace(step=one.step and dataclasses.replace(one.step, step=counter))
            for one in biases
        ]
        return found._replace(tensors=[weight, *biases])

    return corrected


@fault("scaling missing in grad B", "test_golden.py", "FoldedLayer.factor_gradients")
def _(factor_gradients):
    def unscaled(self, blocks):
        grad_A, grad_B = factor_gradients(self, blocks)
        return grad_A, grad_B / self._scalings

    return unscaled


@fault("transposed layout ignored", "test_golden.py", "_oriented")
def _(oriented):
    return lambda tensor, group: tensor


# -- the adapter form ---------------------------------------------------------------------------


@fault("c_i forgotten in the gradient of B", "test_adapter_golden.py",
       "AdapterLayer.factor_gradients")  # fmt: skip
def _(factor_gradients):
    def unscaled(self, blocks):
        grad_A, grad_B = factor_gradients(self, blocks)
        return grad_A, self.lora_B.grad.to(grad_B.dtype)

    return unscaled


@fault("c_i forgotten in the step of B", "test_adapter_golden.py", "AdapterLayer.writes")
def _(writes):
    def unscaled(self, winners):
        found = writes(self, winners)
        adapters = [
            one._replace(slices=[part._replace(scale=1.0) for part in one.slices])
            for one in found.adapters
        ]
        return found._replace(adapters=adapters)

    return unscaled


@fault("c_i the wrong way round", "test_adapter_golden.py", "stored_scales")
def _(stored_scales):
    return lambda group: [1 / scale for scale in stored_scales(group)]


@fault("c_i in the decay of B", "test_adapter_golden.py", "apply_step")
def _(apply_step):
    def scaled(values, moments, step, *args, scale=1.0, **options):
        if step is not None:
            values.mul_((1 - step.decay * scale) / step.kept)
        apply_step(values, moments, step, *args, scale=scale, **options)

    return scaled


@fault("c_i forgotten when factors are read", "test_adapter_golden.py",
       "AdapterLayer.read_factors", "stored_scales")  # fmt: skip
def _(read_factors, stored_scales):
    def stored(cls, group, *args):
        factors = read_factors.__func__(cls, group, *args)
        pairs = zip(factors, stored_scales(group), strict=True)
        return [(A, B * scale) for (A, B), scale in pairs]

    return classmethod(stored), stored_scales


@fault("explicit form: the bias decays and the weight does not", "test_adapter_golden.py",
       "DenseTensor.adamw_step")  # fmt: skip
def _(adamw_step):
    other = {"weight_decay": "bias_weight_decay", "bias_weight_decay": "weight_decay"}

    def swapped(self, weight_decay="weight_decay"):
        in_adapter = self.group.get("adapter_scaling") is not None
        return adamw_step(self, other[weight_decay] if in_adapter else weight_decay)

    return swapped


@fault("the adapter starts as PEFT draws it", "test_adapter_form.py", "with_adapter",
       "adapter_layers")  # fmt: skip
def _(with_adapter, adapter_layers):
    def drawn(model, *args, **options):
        is_new = not adapter_layers(model)
        adapted = with_adapter(model, *args, **options)
        for tuner in adapter_layers(adapted).values() if is_new else ():
            for factor in tuner.lora_A.values():
                torch.nn.init.kaiming_uniform_(factor.weight, a=math.sqrt(5))
        return adapted

    return drawn, adapter_layers


@fault("what is not trained is left trainable", "test_adapter_form.py", "MoLFAdamW.from_model")
def _(from_model):
    def trainable(cls, model, *args, **options):
        before = {p: p.requires_grad for p in model.parameters()}
        optimizer = from_model.__func__(cls, model, *args, **options)
        for parameter, was in before.items():
            parameter.requires_grad_(was)
        return optimizer

    return classmethod(trainable)


# -- factors and layers -------------------------------------------------------------------------


@fault("an expert is taken for one without wins by its first row", "test_experts_without_wins.py",
       "live_ranks")  # fmt: skip
def _(live_ranks):
    return lambda ranks, lora_B, *, can_read: live_ranks(ranks, lora_B[:1], can_read=can_read)


@fault("experts that have moved are left out of the products", "test_experts_without_wins.py",
       "live_ranks")  # fmt: skip
def _(live_ranks):
    return lambda *args, **options: live_ranks(*args, **options)[:1]


@fault("slices as if all ranks were the first", "test_adapter_twin.py", "owned_by")
def _(owned_by):
    return lambda ranks, index: slice(ranks[0] * index, ranks[0] * index + ranks[index])


@fault("all layers start from the same A", "test_factors.py", "draw_lora_a")
def _(draw):
    return lambda seed, layer, ranks, in_features: draw(seed, "", ranks, in_features)


@fault("a tied head is routed", "test_layers.py", "check_not_tied")
def _(check):
    return lambda *args, **options: None


@fault("a layer under two names has an adapter", "test_adapter_wrong_input.py", "_uses")
def _(uses):
    return lambda model, *, by_every_name: uses(model, by_every_name=False)


# -- merging ------------------------------------------------------------------------------------


@fault("merged in the weight's own dtype", "test_merge.py", "_merge_real", "_Error")
def _(merge_real, error_class):
    def merge(tuners):
        error = error_class()
        for tuner in tuners:
            tuner.merge(safe_merge=True)
            weight = tuner.get_base_layer().weight.data
            error.add(weight, weight)
        return error

    return merge, error_class


@fault("merged into the dequantised weights whatever was asked for", "test_merge.py", "_install")
def _(install):
    def dequantised(plain, name, module, source, tuner, error):
        install(plain, name, module, None, tuner, error)

    return dequantised
