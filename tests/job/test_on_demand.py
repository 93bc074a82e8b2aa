"""Examples that are tokenized when a step needs them: the same training as with all tokenized."""

import json
import signal

import pytest
import yaml
from transformers import AutoTokenizer

from checkpoints import write_checkpoint
from molf.cli import main
from molf.data import on_demand
from molf.data.encoding import encode_samples
from molf.data.on_demand import OnDemand, most_tokens
from molf.data.rows import Rows
from molf.errors import InputError
from molf.job.methods import TrainingData
from molf.job.record.result import ResumeError
from molf.job.trainer import encoder
from molf.job.trainer.run_parts import RECORDS, RunParts, hash_of_examples, hash_of_tokens
from molf.measure.spread import spread
from molf.tasks import TaskOptions, load_task
from near_runs import assert_near_runs
from tiny_models import CHATML, byte_level_tokenizer

ODD = ("Ä" * 30, "\U0001f600" * 12, "\u0958\u0959" * 9, "\u0344\u1f82" * 9, "a" * 60, "<|end|>" * 9)


@pytest.fixture
def data(tmp_path):
    """40 records, of which some are longer than 60 tokens, and others could be."""
    records = [{"prompt": f"{i} is", "completion": f" {i}." + "ß" * (i % 7)} for i in range(40)]
    records[7]["completion"] = records[20]["completion"] = " long" * 40
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def few_known(monkeypatch):
    monkeypatch.setattr(encoder, "PROBED", 5)
    monkeypatch.setattr(on_demand, "PROBED", 5)


@pytest.fixture
def chat_tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("layout", ["pairs", "chat", "instructions"])
def test_the_rows_are_those_of_all_samples(tmp_path, few_known, chat_tokenizer, layout):
    texts = [f"{i}{ODD[i % 6]}"[: 10 + i] for i in range(48)]
    records = {
        "pairs": [{"prompt": "a", "completion": text} for text in texts],
        "chat": [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": "b"},
                ]
            }
            for text in texts
        ],
        "instructions": [{"instruction": "a", "output": text} for text in texts],
    }[layout]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = load_task(TaskOptions(name="custom", data=str(path))).training_samples
    limit = 40 if layout == "pairs" else 64
    whole = encode_samples(chat_tokenizer, samples, limit)
    part = OnDemand(chat_tokenizer, samples, limit).encoded
    assert 0 < whole.left_out < len(samples)
    assert (part.kept, part.left_out) == (whole.kept, whole.left_out)
    assert (list(part.input_ids), list(part.labels)) == (whole.input_ids, whole.labels)
    assert 0 < len(part.tokenized) <= 5
    assert hash_of_tokens(part) == hash_of_examples(whole)
    assert hash_of_examples(part).startswith(RECORDS)
    other = OnDemand(chat_tokenizer, samples[1:], limit).encoded
    assert hash_of_examples(part) != hash_of_examples(other)


@pytest.mark.parametrize("text", ODD)
def test_the_bound_holds(text):
    assert len(byte_level_tokenizer()(text)["input_ids"]) <= most_tokens(text)


def test_all_samples_too_long(few_known, data):
    samples = load_task(TaskOptions(name="custom", data=str(data))).training_samples
    with pytest.raises(InputError, match="samples are longer than max_length=2 tokens"):
        OnDemand(byte_level_tokenizer(), samples, 2)


def test_rows_are_lists():
    rows = Rows([[1, 2], [], [-100, 2**31 - 1]])
    assert (len(rows), list(rows), rows[-1], rows[1:]) == (
        3,
        [[1, 2], [], [-100, 2**31 - 1]],
        [-100, 2**31 - 1],
        [[], [-100, 2**31 - 1]],
    )
    assert rows == [[1, 2], [], [-100, 2**31 - 1]] == rows.as_arrow().to_pylist()
    assert rows != Rows([[1, 2]])
    with pytest.raises(IndexError):
        rows[3]


@pytest.fixture
def trained(tmp_path, data):
    base = write_checkpoint(tmp_path / "base")

    def run(name, *further, code=0):
        path = tmp_path / name
        given = ["--task", "custom", "--model", str(base), "--data", str(data), "--ranks", "4"]
        given += ["--max_length", "60", "--max_steps", "3", "--learning_rate", "1e-2"]
        given += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
        assert main(["train", *given, "--output_dir", str(path), *further]) == code
        return path

    return run


def test_a_resumed_training_has_the_same_bits(trained, few_known, data, monkeypatch, capsys):
    whole = trained("whole")
    row, read = OnDemand.row, []

    def stopping(self, position):
        read.append(position)
        if len(read) == 9:
            signal.raise_signal(signal.SIGTERM)  # a background shell ignores SIGINT
        return row(self, position)

    monkeypatch.setattr(OnDemand, "row", stopping)
    path = trained("part", code=3)
    monkeypatch.setattr(OnDemand, "row", row)
    resume = ["train", "--output_dir", str(path), "--resume"]
    lines = data.read_text()
    data.write_text(lines.replace("39 is", "39 was").replace("38 is", "38 was"))
    assert main(resume) == 2
    assert "the content of data has changed" in capsys.readouterr().err
    data.write_text(lines)
    assert main(resume) == 0
    assert f"Resuming {path} from checkpoint-" in capsys.readouterr().err
    weights = "model/model.safetensors"
    assert (path / weights).read_bytes() == (whole / weights).read_bytes()
    examples = [(run / "examples.jsonl").read_text() for run in (path, whole)]
    assert examples[0] == examples[1]
    known = [json.loads(line)["index"] for line in examples[0].splitlines()]
    assert set(range(40)) - {7, 20} > set(known)  # without those that are held out or too long
    assert len(known) > 30


@pytest.mark.parametrize("place", ["probed", "later", "evaluated"])
def test_a_token_without_an_embedding_is_refused(trained, few_known, data, capsys, place):
    """In the samples that are read first, in those that a step reads, or in the evaluation."""
    base = data.parent / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*(f"<{i}>" for i in range(512)), "<new>"])  # the model has 512
    tokenizer.save_pretrained(base)
    lines = data.read_text().splitlines()
    (data.parent / "evaluated.jsonl").write_text("\n".join(lines[30:]) + "\n")
    probed = set(spread(range(40), 5))
    for number in range(40):
        if place != "evaluated" and (number in probed) == (place == "probed"):
            lines[number] = json.dumps({"prompt": f"{number} is", "completion": " <new>."})
    data.write_text("\n".join(lines) + "\n")
    if place == "evaluated":
        with (data.parent / "evaluated.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "<new> is", "completion": " new."}) + "\n")
    code = 1 if place == "later" else 2  # the training had begun
    path = trained("unknown", "--eval_data", str(data.parent / "evaluated.jsonl"), code=code)
    error = capsys.readouterr().err
    if place == "evaluated":
        assert "A text of the evaluation has a token with id " in error
    else:
        assert "the examples have the token '<new>' (id " in error
    assert "and the model has 512 embeddings. Resize them, or give" in error
    assert not (path / "model").exists()


def test_a_checkpoint_with_a_hash_of_all_tokens_is_continued(few_known, data):
    samples = load_task(TaskOptions(name="custom", data=str(data))).training_samples
    tokenizer = byte_level_tokenizer()
    whole = encode_samples(tokenizer, samples, 60)
    data = TrainingData(OnDemand(tokenizer, samples, 60).encoded, 1)
    parts = RunParts(*[None] * 6, (), {}, data)
    for known in (hash_of_tokens(whole), parts.data_hash):
        parts.check({"data": known, "frozen": {}})
    other = OnDemand(tokenizer, samples[1:], 60).encoded
    for changed in (hash_of_tokens(other), hash_of_examples(other)):
        with pytest.raises(ResumeError, match="its examples have changed"):
            parts.check({"data": changed, "frozen": {}})


@pytest.fixture
def shown(capsys):
    def read(word):
        [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith(word)]
        return line

    return read


@pytest.mark.parametrize("further", [(), pytest.param(("--packing",), marks=pytest.mark.slow)])
def test_kept_tokens_give_the_same_bits(trained, data, tmp_path, monkeypatch, shown, further):
    whole = trained("whole", *further)
    cache = ["--token_cache", str(tmp_path / "tokens"), *further]
    monkeypatch.setattr(encoder, "PART", 5)
    monkeypatch.setattr(encoder, "PROBED", 5)  # the option stands above tokens on demand
    kept = trained("kept", *cache, "--dataset_num_proc", "2")
    [file] = (tmp_path / "tokens").iterdir()
    assert shown("Tokens: ").startswith(f"Tokens: kept in {tmp_path}/tokens (")
    monkeypatch.setattr(encoder, "encode_quietly", None)
    monkeypatch.setattr(encoder, "encode_in_processes", None)
    read = trained("read", *cache)
    assert shown("Tokens: ") == f"Tokens: read from {file}."
    weights = [(path / "model/model.safetensors").read_bytes() for path in (whole, kept, read)]
    assert weights[0] == weights[1] == weights[2]
    config = yaml.safe_load((read / "config.yaml").read_text())
    assert config["token_cache"] == str(tmp_path / "tokens")
    again = ["train", "--output_dir", str(read), "--resume", "--dataset_num_proc", "3"]
    assert main([*again, "--token_cache", str(tmp_path / "others")]) == 0
    assert "is complete: there is nothing to resume" in shown("molf: ")
    monkeypatch.undo()
    data.write_text(data.read_text().replace("39 is", "39 was"))
    trained("others", *cache)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("run/tokens", "lies in output_dir"),
        ("records.jsonl", "is not a directory. Give one, or a new name"),
        ("folder/tokens", "/folder, whose files are all read as records. Give a folder beside"),
    ],
)
def test_a_wrong_place_of_tokens(trained, tmp_path, shown, place, words):
    (tmp_path / "folder").mkdir()
    further = ["--validation_data", str(tmp_path / "folder"), "--eval_steps", "1"]
    path = trained("run", "--token_cache", str(tmp_path / place), *further, code=2)
    error = shown("molf: error: ")
    assert error.startswith(f"molf: error: token_cache {tmp_path}/{place} ")
    assert words in error
    assert not path.exists()


def test_dry_run_keeps_no_tokens(trained, tmp_path):
    trained("run", "--dry_run", "--token_cache", str(tmp_path / "tokens"))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(trained, tmp_path, launch, monkeypatch):
    """With examples on demand, and with kept tokens, which one of them makes."""
    data = tmp_path / "many.jsonl"
    records = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(2400)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["train", "--task", "custom", "--model", str(write_checkpoint(tmp_path / "b"))]
    given += ["--data", str(data), "--ranks", "4", "--max_steps", "3", "--learning_rate", "1e-2"]
    given += ["--max_eval_samples", "4", "--per_device_train_batch_size", "2"]
    given += ["--logging_steps", "1"]
    one = tmp_path / "one"
    launch.to_the_end([*given, "--gradient_accumulation_steps", "2", "--output_dir", str(one)], 1)
    for name, further in (
        ("demand", []),
        ("kept", ["--token_cache", str(tmp_path / "tokens"), "--dataset_num_proc", "2"]),
        ("read", ["--token_cache", str(tmp_path / "tokens")]),
    ):
        path = tmp_path / name
        split = ["--gradient_accumulation_steps", "1", "--output_dir", str(path)]
        main_process, other = launch.to_the_end([*given, *split, *further])
        assert ("in 1,000 of them" in main_process.errors) == (name == "demand")
        assert other.errors == ""
        assert_near_runs(one, path)
        assert len(list(tmp_path.glob("tokens/*"))) == (name != "demand")


def losses(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("method", ["molf", "eva"])
def test_a_training_has_the_same_bits(trained, tmp_path, capsys, monkeypatch, method):
    whole = trained("whole", "--method", method, "--logging_steps", "1")
    capsys.readouterr()
    monkeypatch.setattr(encoder, "PROBED", 5)
    monkeypatch.setattr(on_demand, "PROBED", 5)
    further = ["--logging_steps", "1", "--max_eval_samples", "1"]
    part = trained("part", "--method", method, *further)
    assert " in 5 of them" in capsys.readouterr().err
    assert losses(part) == losses(whole)
    weights = "model/model.safetensors"
    assert (part / weights).read_bytes() == (whole / weights).read_bytes()
    records = [yaml.safe_load((path / "config.yaml").read_text())["run"] for path in (whole, part)]
    for name in ("examples", "left_out_too_long"):
        assert records[0]["data"][name] == records[1]["data"][name]
