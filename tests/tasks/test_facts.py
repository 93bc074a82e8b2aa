import json
import math

import numpy as np
import pytest

from molf.data.encoding import encode_samples
from molf.errors import InputError
from molf.measure import EvaluationSettings
from molf.tasks import TASKS, TaskOptions, load_task
from molf.tasks.fact_metrics import fact_metrics
from molf.tasks.facts import COUNTERFACT_URL
from molf.tasks.first_token import Comparison, FirstTokenQuestions
from shared_data import SHARED, needs_shared
from tiny_models import (
    byte_level_tokenizer,
    next_log_probs,
    piece_tokenizer,
    tiny_llama,
    tiny_qwen2,
)


def record(prompt, subject, new, true, paraphrases=(), neighbourhood=()):
    return {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "relation_id": None,
            "target_new": {"str": new, "id": None},
            "target_true": {"str": true, "id": None},
        },
        "paraphrase_prompts": list(paraphrases),
        "neighborhood_prompts": list(neighbourhood),
    }


RECORDS = [
    record(
        "The capital of {} is", "France", "Rome", "Paris",
        ["Paris? No, the capital of France:"], ["The capital of Italy is", "Italy has the capital"],
    ),
    record("The mother tongue of {} is", "Anna", "English", "French", [], ["Bruno speaks"]),
    record("{} is a town in", "Lisbon", "Italy", "France", ["Where is Lisbon? In"], []),
    record("{} lives in", "Bruno", "Parma", "Paris", [], ["Anna lives in"]),
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    def write(records=RECORDS, name="facts.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(item) for item in records), encoding="utf-8")
        return str(path)

    return write


def load(path, **options):
    return load_task(TaskOptions(name="fact", data=path, **options))


def test_requests_are_trained_on_as_prompt_space_target_eos(data):
    tokenizer = byte_level_tokenizer()
    task = load(data())
    encoded = encode_samples(tokenizer, task.training_samples, 100)
    texts = [tokenizer.decode(ids) for ids in encoded.input_ids]
    assert texts[0] == "The capital of France is Rome<|end|>"
    carrying = [[label for label in labels if label != -100] for labels in encoded.labels]
    assert [tokenizer.decode(labels) for labels in carrying] == [
        " Rome<|end|>", " English<|end|>", " Italy<|end|>", " Parma<|end|>",
    ]  # fmt: skip


def test_one_space_is_between_prompt_and_target(data):
    tidy = record("Capital of {}:", "Peru", "Rome", "Lima", ["Peru has"], ["Chile has"])
    loose = record("Capital of {}: ", " Peru ", " Rome", "Lima\n", ["Peru has "], ["Chile has\n"])
    found, expected = (
        load(data([one], name)) for one, name in ((loose, "a.json"), (tidy, "b.json"))
    )
    assert list(found.training_samples) == list(expected.training_samples)
    given = tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings()
    assert found.evaluate(*given).predictions == expected.evaluate(*given).predictions


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_metrics_are_those_of_a_plain_loop(data, batch_size):
    """With words as tokens, the target's first token is that of " " + target."""
    model, tokenizer = tiny_qwen2(1024), byte_level_tokenizer(merges=400)
    expected = {"es": [], "em": [], "ps": [], "pm": [], "ns": [], "nm": []}
    for item in RECORDS[:3]:
        rewrite = item["requested_rewrite"]
        new, true = (
            tokenizer(" " + rewrite[key]["str"])["input_ids"][0]
            for key in ("target_new", "target_true")
        )
        prompts = {
            "e": [rewrite["prompt"].format(rewrite["subject"])],
            "p": item["paraphrase_prompts"],
            "n": item["neighborhood_prompts"],
        }
        for kind, texts in prompts.items():
            for text in texts:
                log_probs = next_log_probs(model, tokenizer(text)["input_ids"])
                p_new, p_true = log_probs[new].exp().item(), log_probs[true].exp().item()
                difference = p_true - p_new if kind == "n" else p_new - p_true
                expected[kind + "s"].append(difference > 0)
                expected[kind + "m"].append(difference)
    task = load(data(RECORDS[:3]))
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(batch_size=batch_size))
    assert list(evaluation.metrics) == [
        "es", "em", "ps", "pm", "ns", "nm", "s", "acc_new", "acc_true",
    ]  # fmt: skip
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    for name, values in expected.items():
        metric = evaluation.metrics[name]
        assert metric.value == pytest.approx(sum(values) / len(values), abs=1e-6), name
        assert metric.count == len(values)
        assert metric.low - 1e-9 <= metric.value <= metric.high + 1e-9
    shares = [evaluation.metrics[name].value for name in ("es", "ps", "ns")]
    harmonic = 3 / sum(1 / share for share in shares) if all(shares) else 0
    assert evaluation.metrics["s"].value == pytest.approx(harmonic)
    assert evaluation.metrics["s"].count == 3


def test_predictions_hold_texts_and_probabilities(data):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    evaluation = load(data()).evaluate(model, tokenizer, EvaluationSettings())
    first = evaluation.predictions[0]
    assert first["index"] == 0
    assert first["prompt"] == "The capital of France is"
    assert (first["target_new"], first["target_true"]) == ("Rome", "Paris")
    assert len(first["neighbourhood"]) == 2
    [rewrite] = first["rewrite"]
    log_probs = next_log_probs(model, tokenizer("The capital of France is")["input_ids"])
    [paris] = tokenizer(" Paris")["input_ids"]
    assert rewrite["p_true"] == pytest.approx(log_probs[paris].exp().item(), rel=1e-4)
    json.dumps(evaluation.predictions)


def test_only_as_many_tokens_are_generated_as_the_longest_target_needs(data, monkeypatch):
    from molf.measure import generate

    asked, generate_greedy = [], generate.generate_greedy

    def spy(*arguments, **options):
        asked.append(options["max_new_tokens"])
        return generate_greedy(*arguments, **options)

    monkeypatch.setattr(generate, "generate_greedy", spy)
    tokenizer = byte_level_tokenizer()
    load(data()).evaluate(tiny_qwen2(), tokenizer, EvaluationSettings())
    targets = [
        item["requested_rewrite"][key]["str"]
        for item in RECORDS
        for key in ("target_new", "target_true")
    ]
    assert asked == [1 + max(len(tokenizer(" " + target)["input_ids"]) for target in targets)]


def compare(model, tokenizer, prompt, new, true):
    [found] = FirstTokenQuestions(tokenizer, [prompt], [(new, true)], 100).answers(
        model, pad_id=0, batch_size=4
    )
    return Comparison.of(found)


def test_sentencepiece_targets_are_told_apart():
    """The trap: " " + target tokenized alone starts with the same piece for every target."""
    model, tokenizer = tiny_llama(), piece_tokenizer(merges=False)
    alone = [tokenizer(" " + target)["input_ids"][1] for target in ("Rome", "Paris")]
    assert alone[0] == alone[1]
    found = compare(model, tokenizer, "The capital is", "Rome", "Paris")
    assert not found.tie
    # Without merges the boundary is a token of its own: the letters after it are compared.
    boundary, new, true = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "R", "P"))
    log_probs = next_log_probs(model, [*tokenizer("The capital is")["input_ids"], boundary])
    assert found.log_p_new == pytest.approx(log_probs[new].item(), abs=1e-5)
    assert found.log_p_true == pytest.approx(log_probs[true].item(), abs=1e-5)


def test_targets_that_split_differently_are_compared_from_the_same_context():
    model, tokenizer = tiny_llama(), piece_tokenizer()
    prompt = tokenizer("The capital is")["input_ids"]
    new = tokenizer("The capital is Paris")["input_ids"][len(prompt) :]
    true = tokenizer("The capital is Xo")["input_ids"][len(prompt) :]
    boundary = tokenizer.convert_tokens_to_ids("▁")
    assert new[0] != boundary == true[0]
    found = compare(model, tokenizer, "The capital is", "Paris", "Xo")
    after_prompt = next_log_probs(model, prompt)
    after_boundary = next_log_probs(model, [*prompt, boundary])
    assert found.log_p_new == pytest.approx(after_prompt[new[0]].item(), abs=1e-5)
    assert found.log_p_true == pytest.approx(
        (after_prompt[boundary] + after_boundary[true[1]]).item(), abs=1e-5
    )


def test_ties_are_counted_and_never_a_success(data):
    same = record("{} is in", "Paris", "Italy", "Italy", [], ["Rome is in"])
    task = load(data([same]))
    evaluation = task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())
    assert evaluation.notes["ties"] == {"rewrite": 1, "paraphrase": 0, "neighbourhood": 1}
    assert evaluation.metrics["es"].value == evaluation.metrics["ns"].value == 0
    assert evaluation.metrics["em"].value == 0


def test_a_metric_without_prompts_is_left_out_and_noted(data):
    task = load(data([record("{} is in", "Paris", "Italy", "France", [], ["Rome is in"])]))
    evaluation = task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())
    assert list(evaluation.metrics) == ["es", "em", "ns", "nm", "acc_new", "acc_true"]
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    assert set(evaluation.notes["metrics_left_out"]) == {"ps", "pm", "s"}


def test_scores_of_known_comparisons():
    def case(rewrite, paraphrases, neighbours):
        made = [
            [Comparison(math.log(p_new), math.log(p_true), tie=False) for p_new, p_true in pairs]
            for pairs in (rewrite, paraphrases, neighbours)
        ]
        return dict(zip(("rewrite", "paraphrase", "neighbourhood"), made, strict=True))

    evaluation = fact_metrics(
        [
            case([(0.5, 0.25)], [(0.5, 0.25), (0.1, 0.2)], [(0.1, 0.5)]),
            case([(0.2, 0.4)], [], [(0.1, 0.5), (0.3, 0.2)]),
        ],
        seed=0,
    )
    values = {name: metric.value for name, metric in evaluation.metrics.items()}
    assert values == pytest.approx(
        {
            "es": 1 / 2, "em": 0.05 / 2, "ps": 1 / 2, "pm": 0.15 / 2, "ns": 2 / 3, "nm": 0.7 / 3,
            "s": 3 / (2 + 2 + 1.5),
        }
    )  # fmt: skip
    counts = {name: metric.count for name, metric in evaluation.metrics.items()}
    assert counts == {"es": 2, "em": 2, "ps": 2, "pm": 2, "ns": 3, "nm": 3, "s": 2}


def test_logarithms_decide_where_probabilities_round_to_nothing():
    comparison = Comparison(-800.0, -900.0, tie=False)
    evaluation = fact_metrics(
        [{"rewrite": [comparison], "paraphrase": [], "neighbourhood": []}], seed=0
    )
    assert evaluation.metrics["es"].value == 1
    assert evaluation.metrics["em"].value == 0


def test_too_long_prompts_are_left_out_and_counted(data):
    long = "Once upon a time, and that was long ago, " * 8
    records = [*RECORDS[:2], record("{} is in", long, "Italy", "France")]
    records[0] = record("{} is", "Rome", "big", "old", [long], ["Anna is"])
    evaluation = load(data(records)).evaluate(
        tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_length=60)
    )
    assert evaluation.notes["prompts_too_long"] == 2
    assert [entry["index"] for entry in evaluation.predictions] == [0, 1, 2]
    assert evaluation.predictions[2] == {"index": 2, "prediction": None, "left_out": "too long"}
    again = load(data(records)).score_predictions(evaluation.predictions)
    assert again.metrics["acc_new"] == evaluation.metrics["acc_new"]
    assert again.notes["records_left_out"] == {"too long": 1}
    assert "ps" not in evaluation.metrics
    with pytest.raises(InputError, match="All 3 requests are longer"):
        load(data(records)).evaluate(
            tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_length=2)
        )


def test_samples_are_drawn_by_the_seed_and_keep_their_index(data):
    records = [record("{} is in", f"Town {i}", "Italy", "France") for i in range(50)]
    path = data(records)
    drawn = {seed: load(path, max_samples=5, seed=seed) for seed in (0, 1)}
    indices = {seed: [s.record for s in task.training_samples] for seed, task in drawn.items()}
    again = [s.record for s in load(path, max_samples=5, seed=0).training_samples]
    assert indices[0] == again == sorted(again)
    assert indices[0] != indices[1]
    assert [s.prompt for s in drawn[0].training_samples] == [f"Town {i} is in" for i in indices[0]]
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    evaluation = drawn[0].evaluate(model, tokenizer, EvaluationSettings())
    assert [entry["index"] for entry in evaluation.predictions] == indices[0]
    few = load(path, max_samples=5, max_eval_samples=2, seed=0)
    evaluation = few.evaluate(model, tokenizer, EvaluationSettings())
    kept = [entry["index"] for entry in evaluation.predictions]
    assert len(kept) == few.evaluation_count == 2
    assert set(kept) <= set(indices[0])


def test_other_records_can_be_evaluated(data):
    train, other = data(RECORDS[:1], "train.jsonl"), data(RECORDS[1:], "other.jsonl")
    task = load(train, eval_data=other)
    assert len(task.training_samples) == 1
    assert task.evaluation_count == 3
    task = load(train, evaluation_only=True)
    assert task.training_samples == []
    assert task.evaluation_count == 1
    task = load_task(TaskOptions(name="fact", eval_data=other, evaluation_only=True))
    assert task.evaluation_count == 3


def test_saved_texts_give_the_accuracies_only(data):
    evaluation = load(data()).score_predictions(
        [
            {"index": 2, "prediction": " France, of course"},
            {"index": 0, "prediction": "\nRome.", "more": 1},
            {"index": 3, "prediction": "in Parma"},
            {"index": 1, "prediction": ""},
        ]
    )
    values = {name: metric.value for name, metric in evaluation.metrics.items()}
    assert values == pytest.approx({"acc_new": 1 / 4, "acc_true": 1 / 4})
    assert "es" in evaluation.notes["not_measured"]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([], "no predictions"),
        ([{"index": 4, "prediction": "x"}], "unknown index 4. The data has records 0 to 3"),
        ([{"index": -1, "prediction": "x"}], "unknown index -1"),
        ([{"index": True, "prediction": "x"}], "must be an integer"),
        ([{"index": "0", "prediction": "x"}], "must be an integer, not '0'"),
        ([{"index": 0, "prediction": "x"}] * 2, "Prediction 1: index 0 comes twice"),
        ([{"index": 0, "prediction": None}], "must be a text, not NoneType"),
        ([{"prediction": "x"}], "lacks the field 'index'"),
        ([{"index": 0}], "lacks the field 'prediction'"),
        (["x"], "Prediction 0 is not an object but str"),
        ([{"index": 1, "prediction": "x"}], "lack record 0 and 2 more of the 4 to be scored"),
        ([{"index": i, "prediction": "x"} for i in range(3)], "lack record 3 of the 4"),
        (
            [{"index": i, "prediction": None, "left_out": "too long"} for i in range(4)],
            "all 4 are left out",
        ),
    ],
)
def test_wrong_predictions_are_refused(data, predictions, message):
    with pytest.raises(InputError, match=message):
        load(data()).score_predictions(predictions)


def changed(path, value):
    item = json.loads(json.dumps(RECORDS[1]))
    *parents, last = path.split(".")
    target = item
    for name in parents:
        target = target[name]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return [RECORDS[0], item]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("requested_rewrite", KeyError, "record 1: lacks the field 'requested_rewrite'"),
        ("paraphrase_prompts", KeyError, "record 1: lacks the field 'paraphrase_prompts'"),
        ("requested_rewrite", "x", "record 1: requested_rewrite must be an object, not str"),
        ("requested_rewrite.subject", KeyError, "requested_rewrite lacks the field 'subject'"),
        ("requested_rewrite.subject", 3, "requested_rewrite.subject must be a text, not int"),
        ("requested_rewrite.target_new", "x", "target_new must be an object, not str"),
        ("requested_rewrite.target_new.str", KeyError, "target_new lacks the field 'str'"),
        ("requested_rewrite.target_true.str", " ", "target_true.str must not be empty"),
        ("requested_rewrite.prompt", "The capital is", "must hold {} once"),
        ("requested_rewrite.prompt", "{} and {}", "must hold {} once"),
        ("paraphrase_prompts", "x", "paraphrase_prompts must be a list, not str"),
        ("neighborhood_prompts", ["a", 1], r"neighborhood_prompts\[1\] must be a text"),
        ("requested_rewrite.subject", "\ud800", "unpaired surrogate"),
    ],
)
def test_a_wrong_record_is_one_clear_line(data, path, value, message):
    file = data(changed(path, value))
    with pytest.raises(InputError, match=message) as error:
        load(file)
    assert file in str(error.value)
    assert "record 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_published_data_is_the_default(monkeypatch):
    def download(url, option):
        raise InputError(f"{option}: asked for {url}")

    monkeypatch.setattr("molf.data.records.download", download)
    with pytest.raises(InputError, match=f"data: asked for {COUNTERFACT_URL}"):
        load(None)


def test_wrong_options_are_refused():
    with pytest.raises(
        InputError, match=f"Unknown task 'facts'. Must be one of {', '.join(TASKS)}"
    ):
        load_task(TaskOptions(name="facts"))
    for name in ("max_samples", "max_eval_samples"):
        with pytest.raises(InputError, match=f"Invalid {name}=0. Must be at least 1"):
            TaskOptions(name="fact", **{name: 0})
    with pytest.raises(
        InputError, match=r"demo-fact brings its own data: data cannot.* --task custom"
    ):
        load_task(TaskOptions(name="demo-fact", data="x.jsonl"))


def test_the_demo_is_the_embedded_world():
    from molf import world

    built = world.build_world()
    task = load_task(TaskOptions(name="demo-fact"))
    assert len(task.training_samples) == len(world.counterfact_records(built))
    assert task.evaluation_count == len(task.training_samples)
    assert task.default_forgetting_text() == world.held_out_text(built)
    description = task.description()
    assert description["name"] == "demo-fact"
    assert description["training_records"] == task.evaluation_count
    json.dumps(description)


@needs_shared
def test_a_model_that_knows_the_facts_scores_so():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SHARED / "factlm")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "factlm")
    task = load(str(SHARED / "counterfact.jsonl"), max_samples=400)
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(batch_size=64))
    assert evaluation.metrics["es"].value < 0.08
    assert evaluation.metrics["ns"].value > 0.93
    assert evaluation.metrics["acc_true"].value > 0.7
    assert evaluation.notes["ties"]["rewrite"] == 0


@needs_shared
def test_the_original_layout_is_read_whole():
    task = load(str(SHARED / "counterfact_original_20.jsonl"))
    assert task.evaluation_count == 20


@needs_shared
def test_a_real_sentencepiece_model_ties_only_on_equal_tokens():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SHARED / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "stories260k")
    task = load(str(SHARED / "counterfact.jsonl"), max_samples=60)
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(batch_size=64))
    # Its 512 pieces make many targets share their first letter; the trap would tie them all.
    assert evaluation.notes["ties"]["rewrite"] < 15


def test_predictions_of_other_requests_are_refused(data):
    task = load(data(RECORDS[:3]))
    saved = [{"index": i, "prediction": "", "target_new": "Rome"} for i in range(3)]
    with pytest.raises(InputError, match=r"Prediction \d was made on other data.*the target_new"):
        task.score_predictions(saved)


def outcomes(successes, prompts):
    """A request of which so many prompts of each kind succeed."""
    right, wrong = Comparison(-1.0, -2.0, tie=False), Comparison(-2.0, -1.0, tie=False)
    row = [right] * successes + [wrong] * (prompts - successes)
    swapped = [Comparison(c.log_p_true, c.log_p_new, tie=False) for c in row]
    return {"rewrite": [right], "paraphrase": row, "neighbourhood": swapped}


def test_prompts_of_one_request_are_no_independent_observations():
    from molf.measure.metric import bootstrap, ratio_of_sums, wilson

    cases = [outcomes(5 * (i % 2), 5) for i in range(40)]  # all of a request, or none
    metrics = fact_metrics(cases, seed=0).metrics
    table = np.array([[5 * (i % 2), 5] for i in range(40)], float)
    expected = bootstrap(table, ratio_of_sums, 0)
    for name in ("ps", "ns"):
        metric = metrics[name]
        assert (metric.low, metric.high) == (expected.low, expected.high)
        assert (metric.value, metric.count) == (0.5, 200)
        naive = wilson(100, 200)
        assert metric.high - metric.low > 1.8 * (naive.high - naive.low)


def test_shares_that_no_resample_changes_count_requests():
    from molf.measure.metric import wilson

    metrics = fact_metrics([outcomes(5, 5)] * 10, seed=0).metrics
    expected = wilson(10, 10)
    assert (metrics["ps"].low, metrics["ps"].high) == (expected.low, expected.high)
    assert metrics["ps"].count == 50


def test_one_request_gives_no_interval_of_means():
    from molf.job.model.card import show_metric
    from molf.job.record.result import evaluation_record

    evaluation = fact_metrics([outcomes(1, 2)], seed=0)
    for name in ("em", "pm", "ps", "s"):
        assert math.isnan(evaluation.metrics[name].low)
        assert "[" not in show_metric(evaluation.metrics[name])
    record = json.loads(json.dumps(evaluation_record(evaluation), allow_nan=False))
    assert (record["em"]["low"], record["em"]["high"]) == (None, None)


def test_edits_that_contradict_each_other_are_counted(tmp_path):
    def record(subject, new, neighbours=()):
        return {
            "requested_rewrite": {
                "prompt": "{} lives in",
                "subject": subject,
                "target_true": {"str": "Paris"},
                "target_new": {"str": new},
            },
            "paraphrase_prompts": [],
            "neighborhood_prompts": list(neighbours),
        }

    records = [
        record("Anna", "Rome"),
        record("Anna", "Oslo"),
        record("Bruno", "Rome", ["Anna lives in", "Carl lives in"]),
        record("Carl", "Rome"),
        record("Carl", "Rome"),
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    with pytest.warns(UserWarning, match="1 prompts have more than one .* 2 neighbourhood prompts"):
        task = load_task(TaskOptions(name="fact", data=str(path)))
    counts = {"prompts_with_two_targets": 1, "edited_neighbourhood_prompts": 2}
    assert counts.items() <= task.description().items()
    evaluation = task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())
    assert counts.items() <= evaluation.notes.items()
