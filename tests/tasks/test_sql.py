import copy
import json
import time

import pytest
import torch

from molf.data.encoding import encode_samples
from molf.errors import InputError
from molf.measure import EvaluationSettings
from molf.sql.limits import Limits
from molf.tasks import TaskOptions, load_task
from molf.tasks.questions import load_questions
from molf.tasks.sql import SqlTask
from molf.tasks.sql_questions import SQL
from question_records import sql, texts, values, write
from shared_data import SHARED, needs_shared
from tiny_models import byte_level_tokenizer, piece_tokenizer, tiny_llama, tiny_qwen2

NAMES = [
    "execution_accuracy",
    "execution_accuracy_set",
    "execution_accuracy_with_rows",
    "exact_match",
    "logic_match",
    "valid_sql",
    "bleu_1",
    "bleu_4",
]

RECORDS = [
    sql("Names?", "SELECT name FROM town;"),
    sql("Sizes in order?", "SELECT size FROM town ORDER BY size;"),
    sql("How many?", "SELECT count(*) FROM town;", complexity="aggregation"),
    sql("Broken?", "SELECT nothing FROM town;", complexity="aggregation"),
    sql("No schema?", "SELECT 1;", sql_context="CREATE TABLE town (a ENUM('x'));"),
]

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def load(path, **options):
    return load_task(TaskOptions(name="sql", data=str(path), evaluation_only=True, **options))


def test_saved_texts_give_all_metrics(tmp_path):
    task = load(write(tmp_path / "a.jsonl", RECORDS))
    answers = [
        "```sql\nselect name from town\n```",
        "SELECT size FROM town ORDER BY size DESC; DROP TABLE town;",
        "I do not know",
    ]
    evaluation = task.score_predictions(texts(*answers))
    assert sorted(evaluation.metrics) == sorted(NAMES)
    found = {n: m.value for n, m in evaluation.metrics.items() if not n.startswith("bleu")}
    assert found == pytest.approx(
        {
            "execution_accuracy": 1 / 3,  # the sizes come in the wrong order
            "execution_accuracy_with_rows": 1 / 3,
            "execution_accuracy_set": 2 / 3,
            "exact_match": 1 / 3,
            "logic_match": 1 / 3,
            "valid_sql": 2 / 3,
        }
    )
    for metric in evaluation.metrics.values():
        assert metric.count == 3
        assert metric.low <= metric.value <= metric.high
    table = evaluation.tables["by_complexity"]
    assert list(table) == ["aggregation", "basic SQL"]
    assert {name: row["valid_sql"].count for name, row in table.items()} == {
        "aggregation": 1,
        "basic SQL": 2,
    }
    assert table["basic SQL"]["execution_accuracy"].value == 0.5
    assert evaluation.notes["records_left_out"] == {"gold query: sql": 1, "gold schema: sql": 1}
    first, second, third, *left_out = evaluation.predictions
    assert (first["statement"], first["error"]) == ("select name from town", None)
    assert (second["statement"], second["expected"]) == (
        "SELECT size FROM town ORDER BY size DESC",
        "SELECT size FROM town ORDER BY size;",
    )
    assert third["error"] == "query: sql"
    assert [entry["left_out"] for entry in left_out] == ["gold query: sql", "gold schema: sql"]
    # What was written can be read back.
    saved = json.loads(json.dumps(evaluation.predictions))
    assert task.score_predictions(saved).metrics == evaluation.metrics


def test_gold_queries_without_rows_are_counted(tmp_path):
    records = [
        *RECORDS[:2],
        sql("Who?", "SELECT name FROM town WHERE size < 0;"),
        sql("Tidy up", "DELETE FROM town WHERE size < 0;", complexity="data definition"),
    ]
    task = load(write(tmp_path / "a.jsonl", records))
    does_nothing = ["SELECT 1 WHERE 0"] * 3 + ["UPDATE town SET size = 1 WHERE 0"]
    evaluation = task.score_predictions(texts(*does_nothing))
    assert evaluation.notes["gold_without_rows"] == {"queries": 1, "changes": 1}
    assert evaluation.metrics["execution_accuracy"].value == 0.5
    found = evaluation.metrics["execution_accuracy_with_rows"]
    assert (found.value, found.count) == (0, 2)
    table = evaluation.tables["by_complexity"]
    assert table["basic SQL"]["execution_accuracy_with_rows"].count == 2
    assert "execution_accuracy_with_rows" not in table["data definition"]
    assert [entry["gold_with_rows"] for entry in evaluation.predictions] == [True] * 2 + [False] * 2


def test_what_a_run_held_out_can_be_scored_again(tmp_path):
    records = [{**r, "sql_prompt": f"{r['sql_prompt']} {i}"} for i in range(8) for r in RECORDS]
    path = write(tmp_path / "a.jsonl", records)
    run = load_task(TaskOptions(name="sql", data=path, seed=2))
    held_out = run._data.evaluated
    saved = [{"index": index, "prediction": "SELECT 1"} for index in held_out]
    expected = run.score_predictions(saved)
    assert sum(expected.notes["records_left_out"].values()) > 0
    found = load(path, seed=2).score_predictions(expected.predictions)
    assert (found.metrics, found.notes) == (expected.metrics, expected.notes)
    with pytest.raises(InputError, match="lack record"):
        load(path, seed=2).score_predictions(expected.predictions[:-2])


def test_nothing_is_asked_about_records_that_cannot_be_scored(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS[3:])
    message = r"None of the 2 evaluated .* \(gold query: sql: 1, gold schema: sql: 1\)"
    with pytest.raises(InputError, match=message):
        load(path).evaluate(None, byte_level_tokenizer(), EvaluationSettings())
    with pytest.raises(InputError, match=message):
        load(path).score_predictions(texts("a", "b"))


def test_queries_that_never_end_are_counted_and_evaluation_goes_on(tmp_path):
    bomb = f"CREATE TABLE t AS {ENDLESS}"
    records = [sql("a", ENDLESS), RECORDS[0], sql("b", "SELECT 1", sql_context=bomb), RECORDS[2]]
    path = write(tmp_path / "a.jsonl", records)
    options = TaskOptions(name="sql", data=path, evaluation_only=True)
    task = SqlTask(options, load_questions(options, SQL), limits=Limits(seconds=0.3))
    started = time.perf_counter()
    evaluation = task.score_predictions(texts("SELECT 1", ENDLESS, "SELECT 1", "SELECT 2"))
    assert time.perf_counter() - started < 15
    assert evaluation.notes["records_left_out"] == {"gold query: time": 1, "gold schema: time": 1}
    assert evaluation.predictions[1]["error"] == "query: time"
    assert values(evaluation.metrics)["execution_accuracy"] == 0.5
    assert values(evaluation.metrics)["valid_sql"] == 0.5


def test_gold_queries_are_run_once_for_all_evaluations(tmp_path, monkeypatch):
    from molf.sql.metrics import SqlScorer

    asked = []
    gold_failures = SqlScorer.gold_failures

    def spy(scorer, pairs):
        pairs = list(pairs)
        asked.extend(pairs)
        return gold_failures(scorer, pairs)

    monkeypatch.setattr(SqlScorer, "gold_failures", spy)
    task = load(write(tmp_path / "a.jsonl", RECORDS), max_samples=4)
    for _ in range(2):
        task.score_predictions(texts("a", "b", "c", "d", "e"))
    assert len(asked) == 4


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_that_has_learned_the_queries_scores_full(tmp_path, pieces):
    """Trained on `training_samples`, evaluated by the task: the prompts are the same."""
    schema = "CREATE TABLE t (a)"
    queries = ["SELECT a FROM t;", "SELECT 7;", "SELECT ';'"]
    records = [sql(f"{i}?", q, sql_context=schema) for i, q in enumerate(queries)]
    lines = [SqlTask.instruction, "Question: 0?\nTables: 12", schema, "SQL:", *queries]
    tokenizer = piece_tokenizer(lines=lines) if pieces else byte_level_tokenizer()
    model = copy.deepcopy(tiny_llama() if pieces else tiny_qwen2())
    path = write(tmp_path / "a.jsonl", records)
    task = load_task(TaskOptions(name="sql", data=path, eval_data=path))
    encoded = encode_samples(tokenizer, task.training_samples, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = []
    evaluation = task.evaluate(
        model, tokenizer, EvaluationSettings(), lambda what, done, count: seen.append(what)
    )
    assert values(evaluation.metrics) == dict.fromkeys(NAMES, 1)
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    assert [entry["prediction"] for entry in evaluation.predictions] == queries
    assert set(seen) == {"gold queries", "generation", "execution"}


def test_generation_stops_at_the_first_complete_statement(tmp_path, monkeypatch):
    """Whatever the model would go on with, nothing is generated behind the `;`."""
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    records = [sql("a?", "SELECT 1;", sql_context="CREATE TABLE t (a)")]
    task = load(write(tmp_path / "a.jsonl", records))
    script = iter(tokenizer(" SELECT ';' ; SELECT 2; SELECT 3;")["input_ids"])

    class Scripted(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], model.config.vocab_size)
            logits[..., next(script)] = 1
            return logits

    monkeypatch.setitem(model._modules, "lm_head", Scripted())
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings())
    assert evaluation.predictions[0]["prediction"] == "SELECT ';' ;"
    assert evaluation.predictions[0]["statement"] == "SELECT ';'"
    assert tokenizer.decode(list(script)) == " SELECT 2; SELECT 3;"


@needs_shared
def test_real_queries_and_a_model_that_knows_nothing():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = load(SHARED / "text_to_sql.jsonl")
    gold = [question.query for question in task._data.evaluation.questions.values()]
    evaluation = task.score_predictions(texts(*gold))
    assert evaluation.metrics["valid_sql"].count == 18
    assert values(evaluation.metrics) == pytest.approx(dict.fromkeys(NAMES, 1))
    assert sum(evaluation.notes["records_left_out"].values()) == 7

    folder = SHARED / "stories260k"
    task = load(SHARED / "text_to_sql.jsonl", max_samples=8)
    evaluation = task.evaluate(
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
        EvaluationSettings(max_new_tokens=40),
    )
    assert values(evaluation.metrics)["execution_accuracy"] == 0
    left_out = evaluation.notes["records_left_out"]
    assert evaluation.metrics["valid_sql"].count + sum(left_out.values()) == 8
