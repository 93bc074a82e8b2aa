"""What is found before a run has its directory, in a run and in a rehearsal of it."""

import json
import re
import shutil

import pytest
import yaml

from molf.cli import main
from molf.data.stdin import stdin_copy


def with_model(options, model):
    arguments = [*options]
    arguments[arguments.index("--model") + 1] = str(model)
    return arguments


def base_with(path, embeddings=None, **added):
    """A model with as many embeddings as its tokenizer has tokens before some are added."""
    from checkpoints import make_model
    from tiny_models import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    model = make_model("qwen2")
    model.resize_token_embeddings(embeddings or len(tokenizer))
    model.save_pretrained(path)
    tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def small_base(tmp_path):
    return base_with(tmp_path / "small", embeddings=100)


@pytest.mark.parametrize("extra", [[], ["--dry_run"]])
def test_tokenizer_of_another_model(options, small_base, tmp_path, capsys, extra):
    arguments = [*with_model(options, small_base), "--output_dir", str(tmp_path / "run"), *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and the model has 100 embeddings" in error
    assert not (tmp_path / "run").exists()


def test_evaluation_with_the_tokenizer_of_another_model(small_base, facts, capsys):
    assert main(["eval", str(small_base), "--task", "fact", "--data", str(facts)]) == 2
    assert "and the model has 100 embeddings" in capsys.readouterr().err


def test_padding_token_beyond_the_model(options, tmp_path, capsys):
    model = base_with(tmp_path / "base", pad_token="<|new|>")
    arguments = [*with_model(options, model), "--output_dir", str(tmp_path / "run")]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.count("the padding token '<|new|>'") == 1
    assert "takes its place" in error
    saved = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text())
    assert saved["pad_token"] == saved["eos_token"]


def test_examples_with_a_token_that_the_model_has_no_embedding_for(
    options, facts, tmp_path, capsys
):
    """Added tokens beyond the embeddings are common; only their use is an error."""
    model = base_with(tmp_path / "base", additional_special_tokens=["<|extra|>"])
    arguments = with_model(options, model)
    assert main([*arguments, "--dry_run"]) == 0
    data = tmp_path / "facts.jsonl"
    data.write_text(facts.read_text().replace("lives in", "lives <|extra|> in"))
    arguments[arguments.index("--data") + 1] = str(data)
    capsys.readouterr()
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"the token '<\|extra\|>' \(id (\d+)\), and the model has \1 embed", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--target_modules", "nothing"], "'nothing'"),
        (["--max_length", "3"], "max_length=3"),
        (["--training_args.lr_scheduler_kwargs", '{"a": 1}'], "lr_scheduler_kwargs"),
        (["--forgetting_data", "nowhere.txt"], "nowhere.txt"),
        (["--report_to", "nothing"], "report_to=nothing"),
    ],
)
def test_dry_run_finds_what_a_run_finds(options, tmp_path, capsys, extra, words):
    errors = []
    for dry in ([], ["--dry_run"]):
        assert main([*options, *extra, "--output_dir", str(tmp_path / "run"), *dry]) == 2
        errors.append(capsys.readouterr().err.splitlines()[-1])
    assert errors[0] == errors[1]
    assert words in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tries_the_quantised_layers_of_a_run(options, monkeypatch, capsys):
    from molf.errors import InputError

    def refuse(quantisation, device):
        raise InputError("load_in_4bit does not work here")

    monkeypatch.setattr("molf.job.opening.check_device", refuse)
    assert main([*options, "--dry_run"]) == 2
    assert "load_in_4bit does not work here" in capsys.readouterr().err


def test_files_are_recorded_and_found_from_anywhere(options, base, facts, tmp_path, monkeypatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    shutil.copy(facts, "facts.jsonl")
    arguments = with_model(options, "base")
    arguments[arguments.index("--data") + 1] = "facts.jsonl"
    arguments += ["--method", "lora", "--save_dtype", "bfloat16", "--forgetting_data"]
    assert main([*arguments, "facts.jsonl", "--output_dir", "run"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    record = {
        "path": str(tmp_path / "facts.jsonl"),
        "bytes": facts.stat().st_size,
        "sha256": hashlib.sha256(facts.read_bytes()).hexdigest(),
    }
    assert config["run"]["data"]["files"] == {"data": [record], "forgetting_data": [record]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = str(tmp_path / "run")
    assert main(["export", run, "--dtype", "float32", "--output_dir", "exported"]) == 0
    assert main(["train", "--config", f"{run}/config.yaml", "--output_dir", "again"]) == 0
    for card in ("model", "adapter"):
        assert str(tmp_path) not in (tmp_path / "run" / card / "README.md").read_text()


def write_pairs(path, count=20):
    records = [{"prompt": f"{i}: What is it?", "completion": f" {i}."} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def custom(base, tmp_path):
    """A training on the user's own records."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    arguments = ["train", "--task", "custom", "--model", str(base), "--data", data]
    return [*arguments, "--ranks", "4", "--max_steps", "2"]


def test_evaluation_on_what_was_trained_on_warns(custom, tmp_path, capsys, monkeypatch):
    """A run's `model/` on the run's data: a tenth was held out, the others were not."""
    run = tmp_path / "run"
    assert main([*custom, "--max_samples", "12", "--output_dir", str(run)]) == 0
    capsys.readouterr()

    def evaluate(*arguments):
        assert main(["eval", *arguments]) == 0
        return "was trained on" in capsys.readouterr().err

    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "copy.jsonl")
    model = [str(run / "model"), "--task", "custom", "--data"]
    assert evaluate(*model, str(tmp_path / "pairs.jsonl"))
    assert evaluate(*model, str(tmp_path / "copy.jsonl"))
    assert not evaluate(*model, write_pairs(tmp_path / "other.jsonl", 5))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "folder" / "train.jsonl")
    write_pairs(tmp_path / "folder" / "test.jsonl", 5)
    assert not evaluate(*model, str(tmp_path / "folder"))

    # The name of standard input is that of any records.
    config = run / "config.yaml"
    kept = config.read_text()
    config.write_text(kept.replace(f"data: {tmp_path / 'pairs.jsonl'}", "data: '-'"))
    assert "data: '-'" in config.read_text()
    for name, expected in (("pairs", True), ("other", False)):
        stdin_copy.cache_clear()
        with (tmp_path / f"{name}.jsonl").open() as records:
            monkeypatch.setattr("sys.stdin", records)
            assert evaluate(*model, "-") == expected
    stdin_copy.cache_clear()
    config.write_text(kept)

    saved = ["--task", "custom", "--data", str(tmp_path / "pairs.jsonl"), "--predictions"]
    saved += [str(run / "predictions.jsonl"), "--output_dir", str(tmp_path / "e")]
    assert main(["eval", *saved, "--max_samples", "12"]) == 0
    scored = json.loads((tmp_path / "e" / "eval.json").read_text())["metrics"]["exact_match"]
    assert scored == json.loads((run / "eval.json").read_text())["after"]["exact_match"]
    (after,) = [json.loads((run / "eval.json").read_text())["after"]["loss"]]
    assert (after["count"], after["low"]) == (1, None)


def test_evaluation_warns_of_control_tokens_and_of_another_splitting(base, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    eos = json.loads((base / "tokenizer_config.json").read_text())["eos_token"]
    records = [{"prompt": f"{i} is", "completion": f" {eos}{i}."} for i in range(20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--task", "custom", "--data", str(path)]
    training = ["train", *options, "--model", str(base), "--split_special_tokens"]
    training += ["--ranks", "4", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main(training) == 0
    model = str(tmp_path / "run" / "model")
    for arguments, is_other, how in (
        ([], True, "act as such"),
        (["--split_special_tokens"], False, "become plain text"),
    ):
        capsys.readouterr()
        assert main(["eval", model, *options, *arguments]) == 0
        error = capsys.readouterr().err
        assert "20 of 20 examples: the text spells out control tokens" in error
        assert how in error
        assert ("was trained with --split_special_tokens" in error) is is_other


def test_evaluated_records_that_are_trained_on_are_counted(custom, tmp_path, capsys):
    record = {"prompt": "A new one:", "completion": " yes."}
    some = write_pairs(tmp_path / "some.jsonl", 5)
    with open(some, "a") as file:
        file.write(json.dumps(record) + "\n")
    (new := tmp_path / "new.jsonl").write_text(json.dumps(record))
    (split := tmp_path / "splits").mkdir()
    write_pairs(split / "train.jsonl", 3)
    write_pairs(split / "test.jsonl", 2)
    data = custom[custom.index("--data") + 1]
    for source, given, counts in (
        (data, ["--eval_data", data], "20 of 20"),
        (data, ["--eval_data", some], "5 of 6"),
        (data, ["--eval_data", some, "--max_samples", "1"], "1 of 6"),  # of those drawn
        (data, ["--eval_data", str(new)], None),
        (str(split), [], "2 of 2"),
        (data, [], None),  # held out
    ):
        arguments = [source if argument == data else argument for argument in custom]
        assert main([*arguments, *given, "--dry_run"]) == 0
        warning = f"{counts} evaluated records are also trained on" if counts else "also trained on"
        assert (warning in capsys.readouterr().err) is (counts is not None), given
