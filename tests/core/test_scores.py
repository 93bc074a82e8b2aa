"""Scores and rules beside the paper's: state, both forms, choices over layers, users' own."""

from __future__ import annotations

import copy
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import molf
from core_helpers import (
    as_on_an_accelerator,
    assert_same_bits,
    backward,
    feed,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from molf import MoLFAdamW, MoLFConfig
from molf.core.scores import registry
from molf.core.scores.registry import FORMS, SCORES, routing
from molf.core.scores.rules import Candidates
from molf.core.scores.terms import DESCENT
from optimizer_forms import build

TEXTS = (*SCORES, "random:0.3", "share:0.5:gsnr", "shuffled:fresh")


@pytest.fixture
def own_scores(monkeypatch):
    """A registry that forgets the scores that a test registers."""
    monkeypatch.setattr(registry, "_registered", {})
    yield
    registry._parsed.cache_clear()


def wide(**options) -> tuple[nn.Module, MoLFAdamW]:
    """Ten routed layers, so that a share of them can be counted."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"layer_{i}": nn.Linear(6 + i, 8) for i in range(10)})
    return model, tiny_optimizer(model, **{"ranks": 2, **options})


def with_full(optimizer: MoLFAdamW) -> set[str]:
    return {name for name, one in optimizer.routing.items() if "full" in one.winners}


@pytest.mark.parametrize("score", TEXTS)
def test_adapter_form_takes_the_path_of_the_folded_form(score):
    """The same experts, gradients and choices where the adapter lies beside the weights."""
    found = []
    for form in ("folded", "explicit"):
        model, optimizer = build(form, "float64", score=score, lora_lr=3e-2)
        model.train()
        run(model, optimizer, range(5))
        found.append(optimizer.routing)
    folded, explicit = found
    for name, decision in folded.items():
        other = next(one for key, one in explicit.items() if key.endswith(name))
        assert decision.winners == other.winners
        assert decision.scores == pytest.approx(other.scores, rel=1e-8)


@pytest.mark.parametrize("form", ["folded", "explicit", "frozen"])
def test_an_average_is_in_the_state(form, tmp_path):
    """Stopped after three steps and resumed from a file: the bits of a run without a stop."""
    straight, optimizer = build(form, score="fresh")
    run(straight, optimizer, range(6))
    first, before = build(form, score="fresh")
    run(first, before, range(3))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    resumed, after = build(form, score="fresh")
    resumed.load_state_dict(first.state_dict())
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, after, range(3, 6))
    assert_same_bits(snapshot(resumed, after), snapshot(straight, optimizer))
    assert after.routing == optimizer.routing
    kept = [key for state in after.state.values() for key in state if key.startswith("score_")]
    layers, experts = len(after.routing), 2 if form == "frozen" else 3
    assert len(kept) == layers * experts


def test_copies_keep_the_average():
    model, optimizer = build("folded", score="fresh")
    run(model, optimizer, range(2))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        pairs = zip(optimizer.state.values(), other.state.values(), strict=True)
        for own, copied in pairs:
            keys = [key for key in own if key.startswith("score_")]
            assert [own[key] for key in keys] == [copied[key] for key in keys]


@pytest.mark.parametrize("score", ["gsnr", "fresh", "epd-corrected", "random:0.4"])
def test_steps_in_the_backward_pass_choose_the_same(score):
    ends = []
    for in_backward in (False, True):
        model, optimizer = build("folded", score=score, optimizer_in_backward=in_backward)
        run(model, optimizer, range(5))
        ends.append((snapshot(model, optimizer), optimizer.routing))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("score", ["gsnr", "fresh"])
@pytest.mark.parametrize("storage", ["exact", "8bit"])
def test_other_storages_follow_float64(storage, score):
    """bfloat16 weights: the sums are made in float32, of the unrounded moments."""
    model, optimizer = build("folded", storage, score=score)
    twin, exact = build("folded", "float64", score=score)
    twin.load_state_dict(model.state_dict())
    for seed in range(2):  # later, 8-bit moments have been rounded
        feed(model, seed)
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = own.grad.double()
        optimizer.step()
        exact.step()
    for name, decision in exact.routing.items():
        rel = 1e-4 if storage == "exact" else 0.2
        assert optimizer.routing[name].scores == pytest.approx(decision.scores, rel=rel, abs=1e-6)


def test_a_refused_step_leaves_the_average():
    model, optimizer = build("folded", score="fresh", nonfinite="skip")
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    model.up.weight.grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)


# -- what the scores mean -----------------------------------------------------------------------


def test_noise_gives_all_experts_the_same_score():
    """GSNR and balanced EPD: independent gradients prefer no shape, rank, scaling or rate."""
    torch.manual_seed(0)
    for score in ("gsnr", "epd-balanced"):
        model = nn.ModuleDict({"layer": nn.Linear(300, 500, bias=False)})
        optimizer = tiny_optimizer(model, ranks=(8, 32), alpha=(1.0, 90.0), score=score, lr=1e-5)
        feed(model, 0)
        optimizer.step()
        values = list(optimizer.routing["layer"].scores.values())
        assert max(values) / min(values) < 1.05, score


def test_fresh_descent_is_negative_where_the_gradient_turns():
    layer = nn.Linear(4, 3, bias=False)
    optimizer = tiny_optimizer(nn.ModuleDict({"layer": layer}), ranks=2, score="fresh")
    signs = []
    for sign in (1.0, 1.0, -1.0, -1.0):
        layer.weight.grad = torch.full_like(layer.weight, sign)
        optimizer.step()
        signs.append(optimizer.routing["layer"].scores["full"])
    assert signs[0] == 0 < signs[1]
    assert signs[3] < 0


@pytest.mark.parametrize("score", ["epd", "epd-corrected"])
def test_corrected_epd_counts_b_alone_while_it_is_zero(score):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(10, 6)})
    optimizer = tiny_optimizer(model, ranks=2, score=score, lora_lr=1.0)
    feed(model, 0)
    optimizer.step()
    state = optimizer.state[model.layer.weight]
    m, v = state["lora_B_exp_avg"], state["lora_B_exp_avg_sq"]
    total = float((m.double() ** 2 / (v.double().sqrt() + 1e-8)).sum())
    count = {"epd": 2 * (10 + 6), "epd-corrected": 2 * 6}[score]
    assert optimizer.routing["layer"].scores["lora0_r2"] == pytest.approx(total / count, rel=1e-5)


def test_descent_is_the_sum():
    found = {}
    for score in ("epd", "descent"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(10, 6)})
        optimizer = tiny_optimizer(model, ranks=2, score=score)
        feed(model, 0)
        optimizer.step()
        found[score] = optimizer.routing["layer"].scores
    assert found["descent"]["full"] == pytest.approx(found["epd"]["full"] * (60 + 6), rel=1e-6)
    assert found["descent"]["lora0_r2"] == pytest.approx(found["epd"]["lora0_r2"] * 32, rel=1e-6)


# -- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_random_share(top_k):
    model, optimizer = wide(score="random:0.3", top_k=top_k, ranks=(2, 3))
    counts = []
    for seed in range(100):
        feed(model, seed)
        optimizer.step()
        assert all(len(one.winners) == top_k for one in optimizer.routing.values())
        counts.append(len(with_full(optimizer)))
    assert 0.25 < sum(counts) / 1000 < 0.35
    assert len(set(counts)) > 3  # layers are drawn apart from one another


def test_a_share_of_layers_goes_to_full_where_it_leads_most():
    model, optimizer = wide(score="share:0.3:epd", lora_lr=0.02)
    for seed in range(4):
        feed(model, seed)
        optimizer.step()
        chosen = with_full(optimizer)
        ratio = {
            name: one.scores["full"] / one.scores["lora0_r2"]
            for name, one in optimizer.routing.items()
        }
        assert chosen == set(sorted(ratio, key=ratio.__getitem__)[-3:])


@pytest.mark.parametrize(("share", "who"), [("0.04", "none: LoRA"), ("0.96", "all: full")])
def test_a_share_that_rounds_to_no_choice_warns(share, who):
    with pytest.warns(UserWarning, match=f"{share} of 10 routed layers rounds to {who} takes"):
        wide(score=f"share:{share}:epd")


def test_a_share_that_rounds_to_a_layer_does_not_warn(recwarn):
    wide(score="share:0.06:epd")
    assert not recwarn.list


def test_shuffled_gives_full_as_many_layers_at_random():
    texts = ("epd", "shuffled:epd")
    pairs = [wide(score=text, lora_lr=0.0155) for text in texts]
    counts, places = [], []
    for seed in range(30):
        for model, optimizer in pairs:
            feed(model, seed)
            optimizer.step()
        (_, plain), (_, shuffled) = pairs
        # Scores of the same moments: both paths start equal, and B moves differently later.
        best = {
            name
            for name, one in shuffled.routing.items()
            if one.scores["full"] >= one.scores["lora0_r2"]
        }
        assert len(with_full(shuffled)) == len(best)
        counts.append(len(best))
        places.append(with_full(shuffled) == best)
        if seed == 0:
            assert len(with_full(plain)) == len(with_full(shuffled))
    assert 0 < sum(counts) < 300
    assert not all(places)


def test_draws_depend_on_the_seed_and_the_step_alone():
    layers = [Candidates(f"layer_{i}", (float(i % 3 == 0), 0.5), True, 1, 7, 5) for i in range(9)]
    for text in ("random:0.5", "shuffled:epd"):
        rule = routing(text).rule
        chosen = dict(zip([one.layer for one in layers], rule.choose(layers), strict=True))
        turned = layers[::-1]  # another order of the parameters
        assert chosen == dict(zip([one.layer for one in turned], rule.choose(turned), strict=True))
        later = [Candidates(c.layer, c.scores, True, 1, 8, 5) for c in layers]
        assert rule.choose(later) != rule.choose(layers)


def test_layers_without_scores_are_no_tie_of_the_share():
    """Zero scores, as at rate 0: the margin is 0 and the first layers get full."""
    layers = [Candidates(name, (0.0, 0.0), True, 1, 0, 0) for name in "abcd"]
    assert routing("share:0.5:epd").rule.choose(layers) == [(0,), (0,), (1,), (1,)]


def test_the_first_lora_expert_of_a_frozen_base_can_win():
    model, optimizer = build("frozen", score="lora", alpha=(40.0, 0.1))
    run(model, optimizer, range(3))
    assert all(one.winners == ("lora0_r2",) for one in optimizer.routing.values())


# -- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["random:0", "random:1", "random:0.\u0665", "random:0.99999999999999999999",
     "random:1.0", "random:x", "random:.", "random:", "random:0.5:epd",
     "share:0.5", "share:0.5:random", "share:2:epd", "shuffled", "shuffled:full", "epd:0.5",
     "shuffled:share:0.5:epd", "random:nan", "random:1e-3", "random: 0.5", "", ["epd"], 5],
)  # fmt: skip
def test_wrong_scores_are_named_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"^Invalid score=.*Must be one of epd, pfn, gsnr") as one:
        MoLFConfig(score=text)
    assert all(form in str(one.value) for form in FORMS)


@pytest.mark.parametrize("score", ["random:0.5", "share:0.5:epd", "shuffled:epd", "full"])
def test_rules_that_need_a_full_expert_refuse_a_frozen_base(score):
    with pytest.raises(ValueError, match=f"Invalid score='{score}' with freeze_base=True"):
        MoLFConfig(score=score, freeze_base=True, ranks=(2, 4))


def test_as_many_winners_as_there_are_lora_experts():
    assert MoLFConfig(score="random:0.5", ranks=(2, 4), top_k=2).top_k == 2
    with pytest.raises(ValueError, match=r"top_k=2. Must be from 1 to 1, the number of LoRA ex"):
        MoLFConfig(score="share:0.5:epd", ranks=4, top_k=2)


@pytest.mark.parametrize("score", ["share:0.5:gsnr", "shuffled:epd"])
@pytest.mark.parametrize("option", ["optimizer_in_backward", "state_offload"])
def test_choices_over_layers_refuse_steps_one_by_one(score, option):
    with pytest.raises(ValueError, match=f"score='{score}' is not possible with {option}=True"):
        tiny_optimizer(tiny_model(), score=score, **{option: True})


def test_saved_groups_are_checked_as_well():
    model, optimizer = build("folded", score="shuffled:epd")
    run(model, optimizer, range(1))
    other, in_backward = build("folded", optimizer_in_backward=True)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="score='shuffled:epd' is not possible with optimizer_in"):
        in_backward.load_state_dict(optimizer.state_dict())


# -- users' own scores --------------------------------------------------------------------------


def largest(name: str = "largest") -> molf.Score:
    """Sum of the gradient's fourth powers: a term that no other score has."""
    term = molf.ScoreTerm("fourth", lambda block: (block.grad.pow(2), block.grad.pow(2)))
    return molf.Score(name, (term,), lambda expert: expert.total("fourth") / expert.size)


@pytest.mark.usefixtures("own_scores")
def test_a_score_of_the_user():
    molf.register_score(largest())
    model, optimizer = build("folded", score="largest")
    feed(model, 0)
    grad = torch.cat([model.up.weight.grad.flatten(), model.up.bias.grad]).double()
    optimizer.step()
    scores = optimizer.routing["up"].scores
    assert scores["full"] == pytest.approx(float((grad**4).mean()), rel=1e-5)
    assert MoLFConfig(score="shuffled:largest").routing.score.name == "largest"
    with pytest.raises(ValueError, match=r"SCORE: .*largest"):
        MoLFConfig(score="larges")


@pytest.mark.usefixtures("own_scores")
def test_a_registered_score_can_be_replaced_and_is_needed_to_load():
    molf.register_score(largest())
    model, optimizer = build("folded", score="largest")
    run(model, optimizer, range(1))
    molf.register_score(largest())
    registry._registered.clear()
    registry._parsed.cache_clear()
    other, plain = build("folded")
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="Invalid score='largest'"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("name", ["epd", "random", "share", "Own", "a:b", ""])
def test_names_that_are_taken_or_cannot_be_given(name):
    with pytest.raises(ValueError, match=f"Invalid name '{name}' of a score"):
        molf.register_score(largest(name))


def made(value=lambda expert: expert.total("squares"), factors=None, name="squares", **kept):
    """A score of the user with one term."""
    term = molf.ScoreTerm(name, factors or (lambda block: (block.grad, block.grad)))
    return molf.Score("own", (term,), value, kept)


@pytest.mark.usefixtures("own_scores")
def test_terms_need_names_of_their_own():
    term = molf.ScoreTerm("one", lambda block: (block.grad,))
    for terms in ((), (term, term)):
        with pytest.raises(ValueError, match="Invalid terms"):
            molf.register_score(molf.Score("own", terms, lambda expert: 0.0))
    with pytest.raises(TypeError, match="Invalid score of type str"):
        molf.register_score("epd")
    for name in ("Squares", "a b", "", 3):
        with pytest.raises(ValueError, match=f"Invalid name {name!r} of a term of score 'own'"):
            molf.register_score(made(name=name))


@pytest.mark.usefixtures("own_scores")
def test_a_term_with_the_name_of_a_shipped_one_is_that_one():
    """The kernels compute shipped terms by name, and would ignore other factors."""
    own = molf.Score("own", (DESCENT,), lambda expert: expert.total("descent"))
    molf.register_score(own)
    with pytest.raises(ValueError, match=r"'descent' of a term .* A shipped term has it"):
        molf.register_score(made(lambda expert: expert.total("descent"), name="descent"))


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("score", "message"),
    [
        (made(lambda expert: expert.total("cubes")), "raised KeyError: 'cubes'. Declared terms"),
        (made(lambda expert: expert.kept["ema"]), "raised KeyError: 'ema'. .* kept: nothing"),
        (made(lambda expert: expert.kept.update(ema=1.0) or 1.0), "its function keeps ema"),
        (made(lambda expert: expert.kept.clear() or 1.0, ema=0.0), "its function keeps nothing"),
        (made(lambda expert: torch.tensor(1.0)), "its function returned Tensor, not a float"),
        (made(lambda expert: None), "its function returned NoneType, not a float"),
        (made(lambda expert: 1.0, lambda block: block.grad), "not a tensor .3, 4."),
        (made(lambda expert: 1.0, lambda block: (block.grad.sum(),)), "not .a tensor ..."),
        (made(lambda expert: 1.0, lambda block: (block.momentum,)), "raised AttributeError"),
        (made(lambda expert: 1.0, lambda block: (block.exp_avg.mul_(2),)), "in place"),
        (made(lambda expert: 1.0, lambda block: (block.direction.abs_(),)), "in place"),
    ],
)  # fmt: skip
def test_scores_that_fail_are_refused_before_a_training(score, message):
    with pytest.raises(ValueError, match=f"of (the term 'squares' of )?score 'own'.*{message}"):
        molf.register_score(score)
    with pytest.raises(ValueError, match="Invalid score='own'"):
        MoLFConfig(score="own")


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("kept", [{"ema": "zero"}, {"E M A": 0.0}, {"ema": True}])
def test_kept_numbers_have_names_and_initial_values(kept):
    with pytest.raises(ValueError, match=re.escape(f"Invalid kept={kept} of score 'own'")):
        molf.register_score(made(**kept))


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("function", [3, lambda: 1.0, lambda expert, other: 1.0])
def test_functions_of_scores_take_one_argument(function):
    with pytest.raises(TypeError, match="Invalid value of score 'own'"):
        molf.register_score(made(value=function))
    with pytest.raises(TypeError, match="Invalid factors of the term 'squares' of score 'own'"):
        molf.register_score(made(factors=function))


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("late", "message"),
    [
        (lambda expert: math.nan, "its function returned nan .*although all of its sums are fini"),
        (lambda expert: 1 / 0, "its function raised ZeroDivisionError: division by zero. Declared"),
        (lambda expert: expert.kept.update(ema=math.inf) or 1.0, "kept: {'ema': inf}"),
        (lambda expert: expert.kept.update(more=1.0) or 1.0, "its function keeps ema, more"),
    ],
)
def test_a_score_that_fails_later_is_named_and_changes_no_weight(late, message):
    good = [True]
    molf.register_score(made(lambda e: e.total("squares") if good else late(e), ema=0.0))
    model, optimizer = build("folded", score="own")
    run(model, optimizer, range(2))
    good.clear()
    before = [one.clone() for one in model.parameters()]
    backward(model, 2)
    with pytest.raises(RuntimeError, match=f"score=own, expert full of layer .*{message}"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_factors_of_two_dtypes(on_accelerator):
    """A mask, and float64, beside float32: what the trial takes, a step takes too."""
    agree = molf.ScoreTerm("agree", lambda block: (block.grad * block.exp_avg > 0, block.grad))
    both = molf.ScoreTerm("both", lambda block: (block.grad > 0, block.exp_avg > 0))
    wide = molf.ScoreTerm("wide", lambda block: (block.grad.double(), block.grad))

    def value(expert):
        return expert.total("wide") + expert.total("agree") + expert.total("both")

    molf.register_score(molf.Score("own", (agree, both, wide), value))
    model, optimizer = build("folded", score="own")
    if on_accelerator:
        as_on_an_accelerator(optimizer)
    feed(model, 0)
    grad = torch.cat([model.up.weight.grad.flatten(), model.up.bias.grad]).double()
    optimizer.step()  # m is 0.1 g, of the same sign
    expected = grad.square().sum() + grad.sum() + (grad > 0).sum()
    assert optimizer.routing["up"].scores["full"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("kind", [np.float64, np.float32, Fraction])
def test_kept_numbers_of_any_kind_are_stored_as_pythons(kind, tmp_path):
    molf.register_score(made(lambda e: e.kept.update(ema=kind(0.5)) or e.total("squares"), ema=0.0))
    model, optimizer = build("folded", score="own")
    run(model, optimizer, range(1))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["state"][0]["score_full_ema"] == 0.5
    assert type(loaded["state"][0]["score_full_ema"]) is float
