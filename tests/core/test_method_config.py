"""MoLFConfig and the choice of winners: standard library alone."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
import warnings

import pytest

import molf
from molf import MoLFConfig
from molf.core.scores.registry import routing
from molf.core.scores.rules import Candidates


def test_defaults_are_the_paper_s():
    config = MoLFConfig()
    assert config.experts == ("full", "lora0_r128")
    assert config.scalings == (32 / math.sqrt(128),)
    assert (config.score, config.top_k, config.lora_dropout) == ("epd", 1, 0.0)


def test_sequences_become_tuples_and_a_number_serves_all_experts():
    config = MoLFConfig(ranks=[4, 8], alpha=[2, 3], target_modules=["a"], exclude_modules=None)
    assert config == MoLFConfig(
        ranks=(4, 8), alpha=(2, 3), target_modules=("a",), exclude_modules=()
    )
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert config.scalings == (2 / 2, 3 / math.sqrt(8))
    assert dataclasses.replace(config, use_rslora=False).scalings == (2 / 4, 3 / 8)
    assert MoLFConfig(ranks=16).ranks == (16,)
    assert MoLFConfig(ranks=(4, 8), alpha=6).alphas == (6, 6)
    assert MoLFConfig(ranks=(2, 2), freeze_base=True).experts == ("lora0_r2", "lora1_r2")


def test_settings_cannot_be_changed_or_given_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoLFConfig().top_k = 2
    with pytest.raises(TypeError):
        MoLFConfig((4,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": ()}, "Invalid ranks=[]. Must be one or more integers, each at least 1."),
        ({"ranks": (4, 0)}, "Invalid ranks=[4, 0]."),
        ({"ranks": 0}, "Invalid ranks=[0]."),
        ({"ranks": (2.0,)}, "Invalid ranks=[2.0]."),
        ({"ranks": (True,)}, "Invalid ranks=[True]."),
        ({"ranks": "8"}, "Invalid ranks=['8']."),
        ({"ranks": None}, "Invalid ranks=[None]."),
        ({"ranks": (2, 3), "alpha": (1.0,)},
         "Invalid alpha=[1.0]. Must be one number, or one per rank (2 ranks)."),
        ({"alpha": 0}, "Invalid alpha=0. Must be positive and finite."),
        ({"alpha": float("inf")}, "Invalid alpha=inf."),
        ({"alpha": None}, "Invalid alpha=None."),
        ({"alpha": 10**400}, "Invalid alpha=10000"),
        ({"ranks": (2, 3), "alpha": (1.0, -1.0)}, "Invalid alpha=(1.0, -1.0)."),
        ({"lora_dropout": 1.0}, "Invalid lora_dropout=1.0. Must be in [0, 1)."),
        ({"lora_dropout": -0.1}, "Invalid lora_dropout=-0.1."),
        ({"lora_dropout": float("nan")}, "Invalid lora_dropout=nan."),
        ({"score": "EPD"}, "Invalid score='EPD'. Must be one of epd, pfn, gsnr, fresh, descent, "
         "epd-balanced, epd-corrected, shape, random, full, lora, random:Q, share:Q:SCORE, "
         "shuffled:SCORE (0 < Q < 1; SCORE: epd, pfn, gsnr, fresh, descent, epd-balanced, "
         "epd-corrected, shape)."),
        ({"score": None}, "Invalid score=None."),
        ({"seed": 1.5}, "Invalid seed=1.5. Must be an integer."),
        ({"seed": None}, "Invalid seed=None."),
        ({"ranks": "128"}, "Invalid ranks=['128']."),
        ({"alpha": "32"}, "Invalid alpha=('32',). Must be positive and finite."),
        ({"target_modules": 5}, "Invalid target_modules=5. Must be a list of name endings,"),
        ({"exclude_modules": [1]}, "Invalid exclude_modules=[1]. Must be a list of name endings,"),
        ({"target_modules": "("}, "Invalid target_modules='(': not a regular expression:"),
        ({"use_rslora": None}, "Invalid use_rslora=None. Must be one of True, False."),
        ({"freeze_base": "no"}, "Invalid freeze_base='no'. Must be one of True, False."),
        ({"freeze_rest": 0}, "Invalid freeze_rest=0. Must be one of True, False, None."),
        ({"target_modules": []}, "Invalid target_modules: empty."),
        ({"target_modules": None}, "Invalid target_modules: empty."),
        ({"top_k": 0}, "Invalid top_k=0. Must be from 1 to 2,"),
        ({"top_k": 3}, "Invalid top_k=3. Must be from 1 to 2, the number of experts that "
         "score='epd' can choose from (full, lora0_r128)."),
        ({"top_k": 1.0}, "Invalid top_k=1.0."),
        ({"top_k": True}, "Invalid top_k=True."),
        ({"score": "full", "top_k": 2}, "Invalid top_k=2. Must be from 1 to 1,"),
        ({"score": "lora", "top_k": 2}, "Invalid top_k=2. Must be from 1 to 1,"),
        ({"freeze_base": True, "top_k": 2}, "Invalid top_k=2. Must be from 1 to 1,"),
        ({"freeze_base": True, "score": "full"},
         "Invalid score='full' with freeze_base=True: there is no full expert."),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=r"^Invalid") as raised:
        MoLFConfig(**settings)
    assert message in str(raised.value)


def choose(scores, score="epd", top_k=1, has_full=True, step=0, seed=0, layer="a"):
    (winners,) = routing(score).rule.choose(
        [Candidates(layer, scores, has_full, top_k, step, seed)]
    )
    return winners


@pytest.mark.parametrize(
    ("scores", "settings", "winners"),
    [
        ((1.0, 3.0, 2.0), {}, (1,)),
        ((1.0, 3.0, 2.0), {"top_k": 2}, (1, 2)),
        ((3.0, 1.0, 2.0), {"top_k": 2, "score": "pfn"}, (0, 2)),
        ((1.0, 3.0, 2.0), {"top_k": 3}, (0, 1, 2)),
        ((2.0, 2.0, 2.0), {}, (0,)),  # ties: the lowest index
        ((1.0, 2.0, 2.0), {}, (1,)),
        ((2.0, 1.0, 2.0, 2.0), {"top_k": 2}, (0, 2)),
        ((0.0, 0.0), {"score": "lora"}, (1,)),
        ((9.0, 1.0, 2.0), {"score": "lora"}, (2,)),
        ((9.0, 1.0), {"score": "lora", "has_full": False}, (0,)),
        ((1.0, 9.0), {"score": "full"}, (0,)),
    ],
)
def test_winners(scores, settings, winners):
    assert choose(scores, **settings) == winners


def test_random_winners_depend_on_seed_layer_and_step():
    draws = [choose((0.0,) * 6, "random", 3, step=step) for step in range(50)]
    assert draws == [choose((1.0, 0, 0, 0, 0, 5.0), "random", 3, step=step) for step in range(50)]
    assert all(list(draw) == sorted(set(draw)) and len(draw) == 3 for draw in draws)
    assert {expert for draw in draws for expert in draw} == set(range(6))
    for change in ({"seed": 1}, {"layer": "b"}):
        assert draws != [choose((0.0,) * 6, "random", 3, step=s, **change) for s in range(50)]


def test_public_names():
    assert set(molf.__all__) <= set(dir(molf))
    with pytest.raises(AttributeError, match="module 'molf' has no attribute 'nothing'"):
        _ = molf.nothing
    assert molf.__version__


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import molf; molf.MoLFConfig()", {"torch", "transformers", "numpy"}),
        ("import molf; molf.MoLFAdamW; molf.trainer_optimizer",
         {"transformers", "peft", "trl", "accelerate", "datasets"}),
    ],
)  # fmt: skip
def test_import_stays_light(statement, absent):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks": 4, "top_k": 2}, r"top_k=2 is the number of experts \(full, lora0_r4\)"),
        ({"ranks": (4, 8), "top_k": 2, "freeze_base": True}, r"\(lora0_r4, lora1_r8\): all of"),
        ({"ranks": (4, 8), "top_k": 2, "score": "lora"}, r"\(lora0_r4, lora1_r8\): all of"),
        ({"ranks": 4, "freeze_base": True}, "ranks=4 has one expert, which always wins"),
    ],
)
def test_nothing_to_choose_warns(given, message):
    with pytest.warns(UserWarning, match=message):
        MoLFConfig(**given)


@pytest.mark.parametrize("given", [{"score": "full"}, {"score": "lora"}, {"ranks": (4, 8)}])
def test_controls_and_choices_do_not_warn(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoLFConfig(**given)
