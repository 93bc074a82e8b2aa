"""What a run says of its routing: one-sided, fixed, or a control."""

import warnings

import pytest
import yaml

from molf.cli import main
from molf.core.config import MoLFConfig
from molf.core.step.decision import Decision
from molf.job.record.routing_meaning import has_changes, routing_meaning
from molf.job.record.wins import Wins

LAYERS = [f"layer{number}" for number in range(10)]


def config_of(**given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MoLFConfig(**{"ranks": (4,), **given})


def meaning(rows, **given):
    """Of one row of winners per step, a winner (or several) per layer."""
    config = config_of(**given)
    wins = Wins(config.experts)
    for step, row in enumerate(rows, 1):
        winners = {layer: (won,) if isinstance(won, str) else won for layer, won in row.items()}
        scores = dict.fromkeys(config.experts, 1.0)
        wins.add({layer: Decision(won, scores) for layer, won in winners.items()}, step)
    return routing_meaning(wins.summary(), config, len(rows))


def every(expert):
    return dict.fromkeys(LAYERS, expert)


def split(first):
    """`full` in some layers, LoRA in the others."""
    return {x: "full" if number < first else "lora0_r4" for number, x in enumerate(LAYERS)}


@pytest.mark.parametrize(
    ("expert", "given", "kind"),
    [
        ("full", {}, "full fine-tuning"),
        ("lora0_r4", {}, "one LoRA of rank 4"),
        ("lora1_r8", {"ranks": (4, 8), "freeze_base": True}, "one LoRA of rank 8"),
        (
            ("lora1_r8", "lora0_r4"),
            {"ranks": (4, 8), "top_k": 2},
            "one LoRA of rank 12",
        ),
        (
            ("lora1_r8", "full"),
            {"ranks": (4, 8), "top_k": 2},
            "full fine-tuning with a LoRA beside it",
        ),
        ("lora0_r4", {"ranks": (4, 8), "score": "lora"}, "one LoRA of rank 4"),
        ("full", {"score": "pfn"}, "full fine-tuning"),
    ],
)
def test_one_sided(expert, given, kind):
    said = meaning([every(expert)] * 3, **given)
    assert "One-sided: " in said
    assert f"every update of the 10 layers: for them this run was {kind}." in said


def test_almost_one_sided():
    rows = [every("full")] * 20
    rows[7] = {**rows[7], "layer3": "lora0_r4"}
    said = meaning(rows)
    assert said.startswith("One-sided: full took 99.5% of updates of the 10 layers: for them")


def test_fixed():
    said = meaning([split(3)] * 5)
    assert "no layer changed its winner after the first decision, in step 1" in said
    assert "a fixed split of the 10 layers (full 3, lora0_r4 7)" in said


def test_fixed_early():
    said = meaning([split(5), *[split(3)] * 30])
    assert "no layer changed its winner after step 2 of 31; 8 of 10 layers never changed" in said


def test_nearly_fixed_and_moving():
    said = meaning([*[split(4)] * 6, *[split(3)] * 6])
    assert said.startswith(
        "Nearly fixed: 9 of 10 layers never changed their winner (full 3, lora0_r4 6)"
    )
    assert "0.1 changes per layer, the last in step 7 of 12" in said
    said = meaning([split(step % 7) for step in range(30)])
    assert said.startswith("4 of 10 layers never changed their winner; ")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([split(step % 7) for step in range(30)], True),
        ([*[split(4)] * 6, *[split(3)] * 6], True),
        ([split(5), *[split(3)] * 30], True),
        ([split(3)] * 5, True),
        ([split(3)], False),
        ([every("full")] * 3, False),
    ],
)
def test_sentences_with_the_number_of_changes_are_recognised(rows, expected):
    assert has_changes(meaning(rows)) is expected


@pytest.mark.parametrize(
    ("expert", "given", "said"),
    [
        ("full", {"score": "full"}, "full took every update (score=full, a control): for the 10"),
        (
            "lora0_r4",
            {"score": "lora"},
            "(score=lora, a control): for the 10 layers this run was one",
        ),
        ("full", {"score": "random"}, "drawn at random (score=random, a control)"),
        (
            ("full", "lora0_r4"),
            {"top_k": 2},
            "full and lora0_r4 took every update (top_k=2: there was nothing to choose): for the "
            "10 layers this run was full fine-tuning with a LoRA beside it.",
        ),
        (
            "lora0_r4",
            {"freeze_base": True},
            "(there is no other): for the 10 layers this run was one",
        ),
    ],
)
def test_controls_are_not_called_one_sided(expert, given, said):
    told = meaning([every(expert)] * 3, **given)
    assert said in told
    assert "One-sided" not in told


def test_one_decision_is_not_called_fixed():
    assert meaning([split(3)]) == "There was one decision for each of the 10 layers."


def test_the_order_of_several_winners_is_no_change():
    rows = [every(("full", "lora1_r8")), every(("lora1_r8", "full"))] * 3
    said = meaning(rows, ranks=(4, 8), top_k=2)
    assert "full and lora1_r8 took every update" in said


def test_a_run_says_it_everywhere(options, tmp_path, capsys):
    arguments = [*options, "--output_dir", str(tmp_path / "run")]
    rate = arguments.index("--lora_learning_rate") + 1
    arguments[rate] = "1e-9"
    assert main(arguments) == 0
    said = "One-sided: full took every update of the 14 layers: for them this run was full"
    assert f"routing  {said}" in capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "won: full 100.0%, lora0_r4 0.0%; 0.0 changes of winner per layer." in card
    assert said in card
    routing = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["routing"]
    assert said in routing["meaning"]
    assert routing["unchanged"] == routing["layers"] == 14
    assert routing["winners_of_unchanged"] == {"full": 14}
    assert routing["won"] == {"full": 1.0, "lora0_r4": 0.0}
    assert (routing["changes"], routing["last_change"]) == (0, None)
