"""Data as people have it: formats, compressed files, several files with weights, stdin."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from molf.cli import main
from molf.cli.app import join_stdin
from molf.data.conversations import Conversation
from molf.data.encoding import encode_samples
from molf.data.files import read_file
from molf.data.records import data_files, read_splits
from molf.data.sample_store import ChosenSamples
from molf.data.samples import PlainText, PromptCompletion
from molf.data.sources import absolute_sources, places, sources_of
from molf.data.stdin import stdin_copy
from molf.errors import InputError
from molf.job.record.provenance import file_records
from molf.measure import EvaluationSettings
from molf.tasks import TaskOptions, load_task
from molf.tasks.preview import preview
from molf.tasks.validation import with_validation
from tiny_models import CHATML, byte_level_tokenizer, tiny_qwen2

TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Paris."}]
RECORDS = {
    "messages": {"messages": TURNS},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "In Paris."},
        ]
    },
    "prompt-completion": {"prompt": "Where?", "completion": " In Paris."},
    "alpaca": {"instruction": "Translate.", "input": "Paris", "output": "Parigi"},
    "text": {"text": "Paris is a city."},
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def load(data, **options):
    return load_task(TaskOptions(name="custom", data=data, **options))


def chat_tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    return tokenizer


def stretches(tokenizer, data):
    """The texts of the first record without and with loss."""
    [record] = list(preview(tokenizer, load(data, preview=True).data_records(), 1000))[:1]
    return [text for text, loss in record.segments if not loss], [
        text for text, loss in record.segments if loss
    ]


@pytest.mark.parametrize("name", RECORDS)
def test_a_format_is_recognised_by_the_first_record(tmp_path, name):
    path = write(tmp_path / "a.jsonl", *[RECORDS[name]] * 2)
    task = load(path, evaluation_only=True)
    assert task.description()["format"] == name
    assert load(path, evaluation_only=True, format=name).evaluation_count == 2
    other = next(one for one in RECORDS if one != name)
    with pytest.raises(InputError, match=f"record 0: lacks the field .* of the format {other}"):
        load(path, evaluation_only=True, format=other)


@pytest.mark.parametrize("second", [name for name in RECORDS if name != "messages"])
def test_a_mixture_in_one_file_is_refused_with_both_records(tmp_path, second):
    path = write(tmp_path / "a.jsonl", *[RECORDS["messages"]] * 3, RECORDS[second])
    message = f"a.jsonl, record 3 has the format {second} .*record 0 the format messages"
    with pytest.raises(InputError, match=message):
        load(path)


def test_format_chooses_between_the_fields_of_a_record(tmp_path):
    both = {**RECORDS["alpaca"], **RECORDS["text"]}
    path = write(tmp_path / "a.jsonl", *[both] * 2)
    with pytest.warns(UserWarning, match="not read: text"):
        assert load(path, evaluation_only=True).description()["format"] == "alpaca"
    with pytest.warns(UserWarning, match="not read: instruction, input, output"):
        task = load(path, evaluation_only=True, format="text")
    assert task.description()["format"] == "text"
    with pytest.raises(InputError, match=r"Invalid format='json'\. Must be one of messages"):
        load(path, format="json")
    with pytest.raises(InputError, match="Invalid format=text with task=med"):
        load_task(TaskOptions(name="med", data=path, format="text"))


def test_instructions_are_a_chat_where_the_model_has_a_template(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS["alpaca"])
    assert stretches(chat_tokenizer(), path) == (
        ["<|im_start|>user\nTranslate.\n\nParis<|im_end|>\n<|im_start|>assistant\n"],
        ["Parigi<|im_end|>"],
    )
    assert stretches(byte_level_tokenizer(), path) == (
        ["### Instruction:\nTranslate.\n\n### Input:\nParis\n\n### Response:\n"],
        ["Parigi<|end|>"],
    )
    record = {"instruction": "Go.", "input": "", "output": "Gone.", "system": "Be kind."}
    path = write(tmp_path / "b.jsonl", record)
    assert stretches(chat_tokenizer(), path)[0] == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert stretches(byte_level_tokenizer(), path)[0] == [
        "Be kind.\n\n### Instruction:\nGo.\n\n### Response:\n"
    ]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, chat_tokenizer])
def test_instructions_are_evaluated(tmp_path, tokenizer):
    records = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(3)]
    task = load(write(tmp_path / "a.jsonl", *records), evaluation_only=True)
    evaluation = task.evaluate(tiny_qwen2(), tokenizer(), EvaluationSettings(max_new_tokens=2))
    assert [entry["expected"] for entry in evaluation.predictions] == ["0", "1", "2"]
    again = task.score_predictions(evaluation.predictions)
    assert again.metrics["exact_match"] == evaluation.metrics["exact_match"]


def test_a_text_carries_loss_everywhere_and_has_no_answer(tmp_path):
    texts = [{"text": f"Number {i} is here."} for i in range(4)]
    path = write(tmp_path / "a.jsonl", *texts)
    tokenizer = byte_level_tokenizer()
    assert stretches(tokenizer, path) == ([], ["Number 0 is here.<|end|>"])
    task = load(path, evaluation_only=True)
    evaluation = task.evaluate(tiny_qwen2(), tokenizer, EvaluationSettings())
    assert tuple(evaluation.metrics) == task.metric_names()[:-3] == ("loss", "perplexity")
    assert all(entry["prediction"] is None for entry in evaluation.predictions)
    encoded = encode_samples(tokenizer, task.evaluated_samples(4), 100)
    assert encoded.labels == encoded.input_ids
    assert task.prompts(tokenizer, 4) == [ids[:-1] for ids in encoded.input_ids]  # without EOS
    with pytest.raises(InputError, match="Invalid predictions with the format text"):
        task.score_predictions(evaluation.predictions)


def test_empty_texts_are_left_out(tmp_path):
    texts = ["One.", "", "Two.", " \n"]
    path = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    with pytest.warns(UserWarning, match="2 of 4 records are left out: an empty text"):
        task = load(path)
    assert task.data_records().left_out == {"an empty text": 2}
    (tmp_path / "a.csv").write_text('text\nOne.\n""\nTwo.\n')
    with pytest.warns(UserWarning, match="1 of 3 records are left out: an empty text"):
        assert len(load(str(tmp_path / "a.csv")).data_records().samples) == 2
    path = write(tmp_path / "b.jsonl", {"text": " "})
    with pytest.raises(InputError, match="none of the 1 records can be used"):
        load(path)


@pytest.mark.parametrize("fixed", [None, "text"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_null_is_an_empty_text(tmp_path, kind, fixed):
    rows = [{"id": i, "text": text} for i, text in enumerate((None, "One.", None, "Two."))]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("id,text\n0,\n1,One.\n2,\n3,Two.\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, *rows)
    with pytest.warns(UserWarning, match="2 of 4 records are left out: an empty text"):
        task = load(str(path), format=fixed)
    assert list(task.data_records().samples) == [1, 3]
    with pytest.raises(InputError, match=r"record 1: needs prompt and completion.*has: texts"):
        load(write(tmp_path / "b.jsonl", {"text": "One."}, {"texts": "Two."}))


def test_files_of_two_formats_are_evaluated_together(tmp_path):
    one = write(tmp_path / "a.jsonl", RECORDS["text"])
    other = write(tmp_path / "b.jsonl", RECORDS["prompt-completion"])
    task = load(f"{one},{other}", evaluation_only=True)
    assert task.description()["format"] == "text, prompt-completion"
    evaluation = task.evaluate(
        tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_new_tokens=1)
    )
    assert evaluation.metrics["loss"].count == 2
    assert evaluation.metrics["exact_match"].count == 1
    assert [entry["prediction"] is None for entry in evaluation.predictions] == [True, False]
    assert task.score_predictions(evaluation.predictions).metrics["exact_match"].count == 1


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_are_read(tmp_path, codec, kind):
    text = {
        "jsonl": '{"a": "é"}\n{"a": "2"}\n',
        "json": '[{"a": "é"}, {"a": "2"}]',
        "csv": "a\né\n2\n",
    }[kind].encode()
    path = tmp_path / f"train.{kind}.{codec}"
    # Two parts behind each other, as `cat a.gz b.gz` makes them.
    content = b"".join(
        gzip.compress(part) if codec == "gz" else pyarrow.compress(part, "zstd", asbytes=True)
        for part in (text[:7], text[7:])
    )
    path.write_bytes(content)
    records = [{"a": "é"}, {"a": "2"}]
    assert read_file(path) == records
    assert read_splits(tmp_path) == {"train": records}
    path.write_bytes(content[:-3])
    with pytest.raises(InputError, match=r"train\..* is no readable (gzip|zstd) file") as error:
        read_file(path)
    assert "\n" not in str(error.value)


def test_a_compressed_file_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 5_000_000))
    monkeypatch.setattr("molf.data.compressed.memory_bytes", lambda: 2_000_000)
    with pytest.raises(InputError, match="decompresses to more than this machine's 2,000,000"):
        read_file(path)


def test_what_datasets_saves_is_read(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(3)]
    parts = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    parts.save_to_disk(tmp_path / "saved")
    assert read_splits(tmp_path / "saved") == {"train": rows, "test": rows[:1]}
    # `datasets` keeps results of `map` beside the data.
    load_from_disk(tmp_path / "saved")["train"].map(lambda row: {"completion": "y"})
    assert [*(tmp_path / "saved").rglob("cache-*.arrow")]
    assert read_splits(tmp_path / "saved") == {"train": rows, "test": rows[:1]}
    (tmp_path / "own").mkdir()
    (tmp_path / "saved/test/data-00000-of-00001.arrow").rename(tmp_path / "own/cache-1.arrow")
    assert read_splits(tmp_path / "own") == {"train": rows[:1]}
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / "feather.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    assert read_file(path) == rows
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="is not a readable Arrow file"):
        read_file(path)


def pairs(tag, count):
    return [{"prompt": f"{tag}{i}", "completion": " x"} for i in range(count)]


def test_several_files_with_weights(tmp_path):
    one = write(tmp_path / "a.jsonl", *pairs("a", 40))
    two = write(tmp_path / "b.jsonl", *pairs("b", 40))
    plain, heavy = load(f"{one},{two}"), load(f"{one}:2,{two}:0.5")
    assert heavy.data_records().held_out == plain.data_records().held_out
    trained = [sample.prompt for sample in heavy.training_samples]
    ours = [sample.prompt for sample in plain.training_samples]
    first = [prompt for prompt in ours if prompt.startswith("a")]
    assert [prompt for prompt in trained if prompt.startswith("a")] == [
        prompt for prompt in first for _ in range(2)
    ]
    drawn = [prompt for prompt in trained if prompt.startswith("b")]
    assert len(set(drawn)) == len(drawn) == round((len(ours) - len(first)) / 2)
    assert set(drawn) < set(ours)
    assert len(load(f"{two}:0.001").training_samples) == 1
    shown = {
        record.index: record for record in preview(byte_level_tokenizer(), heavy.data_records(), 99)
    }
    assert {record.times for record in shown.values()} == {1, 2}
    assert any("weight of its file" in (record.left_out or "") for record in shown.values())


def test_records_are_named_by_their_own_file(tmp_path):
    one = write(tmp_path / "a.jsonl", *pairs("a", 5))
    two = write(tmp_path / "b.jsonl", *pairs("b", 2), {"prompt": "x", "completion": 3})
    with pytest.raises(InputError, match=r"b\.jsonl, record 2: completion must be a text"):
        load(f"{one},{two}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.jsonl,,b.jsonl", "has an empty name between its commas"),
        ("a.jsonl,a.jsonl", "a.jsonl comes twice. Give it once with a weight, such as a.jsonl:2"),
        ("a.jsonl:0", "has the weight 0. Must be above 0"),
        ("a.jsonl,missing.jsonl:2", "there is no file or folder missing.jsonl"),
    ],
)
def test_a_wrong_list_is_one_clear_line(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *pairs("a", 5))
    with pytest.raises(InputError, match=message):
        load(given)


def test_weights_are_for_training_data_of_custom(tmp_path):
    path = write(tmp_path / "a.jsonl", *pairs("a", 20))
    with pytest.warns(UserWarning, match="each record is measured once, whatever its weight"):
        task = load(f"{path}:3", evaluation_only=True)
    assert task.evaluation_count == 20
    other = write(tmp_path / "b.jsonl", *pairs("b", 4))
    with pytest.raises(InputError, match=r"eval_data: .* has the weight 2. Weights are for data"):
        load(path, eval_data=f"{other}:2")
    with pytest.raises(InputError, match="Weights are for the training data of task custom"):
        read_splits(f"{path}:2")
    assert len(read_splits(f"{path},{other}")["train"]) == 24


def test_commas_and_colons_of_names_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "a,b:2"
    odd.mkdir()
    write(odd / "x.jsonl", *pairs("a", 3))
    assert places("a,b:2") == ["a,b:2"]
    assert absolute_sources("a,b:2") == str(odd)
    for one in (
        "owner/name",
        "owner/name:2",
        "https://host/a,b.jsonl",
        "https://host/a.jsonl?x=1,2",
        "http://host:8080",
    ):
        assert [str(source) for source in sources_of(one)] == [one]
        assert sources_of(one)[0].weight == 1
    assert places("https://host/a.jsonl:2,https://host/b.jsonl") == [
        "https://host/a.jsonl",
        "https://host/b.jsonl",
    ]
    write(tmp_path / "c.jsonl", *pairs("a", 3))
    assert absolute_sources("c.jsonl:2,owner/name:x") == f"{tmp_path}/c.jsonl:2,owner/name:x"
    assert len(file_records({"data": "c.jsonl:2,a,b:2"})["data"]) == 1


def test_samples_are_kept_as_they_are(tmp_path):
    odd = {"messages": [{**TURNS[0], "note": "\ud800"}, {**TURNS[1], "tool_calls": None}]}
    files = [write(tmp_path / f"{name}.jsonl", record) for name, record in RECORDS.items()]
    files.append(write(tmp_path / "odd.jsonl", odd))
    samples = load(",".join(files), preview=True).data_records().samples
    assert list(samples) == list(range(6))
    assert 5 in samples
    assert 6 not in samples
    expected = [
        Conversation(tuple(TURNS), 0, 0),
        Conversation(tuple(TURNS), 0, 1),
        PromptCompletion("Where?", " In Paris.", 2),
    ]
    assert [samples[i] for i in range(3)] == expected
    assert samples[4] == PlainText("Paris is a city.", 4)
    assert samples[5].messages[0]["note"] == "\ud800"
    assert "tool_calls" not in samples[5].messages[1]
    chosen = ChosenSamples(samples, [2, 0, 2])
    assert chosen == [samples[2], samples[0], samples[2]]
    assert chosen[1:] == [samples[0], samples[2]]
    assert chosen != [samples[2]]


def test_samples_stay_in_the_store_beside_a_validation_part(tmp_path):
    path = write(tmp_path / "a.jsonl", *pairs("a", 40))
    whole = load(path)
    options = TaskOptions(name="custom", data=path, validation_share=0.25)
    task = with_validation(whole, options, load_task)
    assert isinstance(task.training_samples, ChosenSamples)
    assert (len(task.training_samples), len(task.validation_samples)) == (27, 9)
    apart = {sample.record for sample in task.validation_samples}
    assert task.training_samples == [x for x in whole.training_samples if x.record not in apart]


@pytest.fixture
def given_on_stdin(monkeypatch):
    def give(content):
        stdin_copy.cache_clear()
        monkeypatch.setattr(
            sys,
            "stdin",
            SimpleNamespace(buffer=io.BytesIO(content), closed=False, isatty=lambda: False),
        )

    yield give
    stdin_copy.cache_clear()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_records_from_standard_input(given_on_stdin, pack):
    lines = "".join(json.dumps(record) + "\n" for record in pairs("a", 20))
    given_on_stdin(pack(lines.encode()))
    assert len(load("-").training_samples) == 18
    assert load("-").evaluation_count == 2  # it is read once, and kept
    assert absolute_sources("-") == "-"
    [record] = file_records({"data": "-"})["data"]
    assert (record["path"], record["bytes"]) == ("-", len(pack(lines.encode())))
    assert len(data_files("-")) == 1


def test_standard_input_on_the_command_line(given_on_stdin, tmp_path, capsys):
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "qwen2", "vocab_size": 512, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given_on_stdin(b"".join(json.dumps(record).encode() + b"\n" for record in pairs("a", 20)))
    command = ["data", "--task", "custom", "--model", str(tmp_path), "--data", "-", "--jsonl"]
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert join_stdin(["--eval-data", "-", "-x", "-"]) == ["--eval-data=-", "-x", "-"]
    for given in ("-:2", "-,a.jsonl"):
        assert join_stdin(["--data", given]) == [f"--data={given}"]
    assert join_stdin(["--data", "-x"]) == ["--data", "-x"]


def test_wrong_standard_input(given_on_stdin, monkeypatch):
    given_on_stdin(b"")
    with pytest.raises(InputError, match="standard input is empty"):
        load("-")
    given_on_stdin(b'{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(InputError, match="standard input, line 2: not JSON"):
        load("-")
    given_on_stdin(b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(InputError, match="standard input, which is a terminal"):
        load("-")
