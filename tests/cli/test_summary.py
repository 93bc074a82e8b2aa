"""What a finished evaluation prints."""

from __future__ import annotations

import pytest

from molf.measure.meanings import meanings

FACT = ["es", "em", "ps", "pm", "ns", "nm", "s", "acc_new", "acc_true"]
MED = ["accuracy", "unparsed", "accuracy_logprob"]
SQL = ["execution_accuracy", "execution_accuracy_set", "exact_match", "logic_match"]
SQL += ["bleu_1", "bleu_4", "valid_sql"]
CUSTOM = ["loss", "perplexity", "exact_match"]


@pytest.mark.parametrize("metrics", [FACT, MED, SQL, CUSTOM])
def test_every_metric_has_a_meaning(metrics):
    explained = ", ".join(names for names, _ in meanings([*metrics, "forgetting_loss"]))
    assert sorted(explained.split(", ")) == sorted([*metrics, "forgetting_loss"])


def test_only_what_was_measured_is_explained():
    assert [names for names, _ in meanings(["acc_new"])] == ["acc_new"]
    # In the order of the table, as those of custom.
    table = ["loss", "perplexity", "exact_match", "forgetting_loss"]
    assert [names for names, _ in meanings(table)] == table
