"""`molf data`: what a training would see, from tokenizer and configuration alone."""

import json
import re

import pytest

from browser import needs_browser, opened_browser
from molf.cli import main
from molf.data.conversations import Conversation
from molf.data.encoding import encode_samples
from molf.report.data_page import render_data
from molf.report.place import is_page
from molf.tasks.preview import PreviewedRecord
from tiny_models import CHATML, LINES, byte_level_tokenizer, piece_tokenizer

TALK = [
    {"role": "user", "content": "Wörter? \U0001f600"},
    {"role": "assistant", "content": "Ja, größere. \U0001f600"},
    {"role": "user", "content": "Noch?"},
    {"role": "assistant", "content": "Nein."},
]


def asked(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def model(tmp_path):
    """A checkpoint without weights."""
    path = tmp_path / "model"
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    config = {"model_type": "qwen2", "vocab_size": 512, "max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def shown(tmp_path, model, capsys, monkeypatch):
    """Run `molf data` on records; return what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(records, *arguments, task="custom"):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        before = sorted(tmp_path.rglob("*"))
        options = ["--model", str(model), "--task", task, "--data", str(path), *arguments]
        assert main(["data", *options]) == 0
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr()

    return run


def test_jsonl_has_every_readable_record_and_its_whole_text(shown):
    records = [
        {"messages": TALK},
        {"messages": TALK[:1]},
        *(asked(f"{i} is", f" {i}.") for i in range(20)),
        asked("long " * 60, "x"),
    ]
    lines = [json.loads(line) for line in shown(records, "--jsonl").out.splitlines()]
    assert [line["index"] for line in lines] == [0, *range(2, 23)]
    assert lines[0]["segments"] == [
        ["<|im_start|>user\nWörter? \U0001f600<|im_end|>\n<|im_start|>assistant\n", False],
        ["Ja, größere. \U0001f600<|im_end|>\n", True],
        ["<|im_start|>user\nNoch?<|im_end|>\n<|im_start|>assistant\n", False],
        ["Nein.<|im_end|>\n<|end|>", True],
    ]
    tokenizer = byte_level_tokenizer()
    for line in lines:
        text = "".join(part for part, _ in line["segments"])
        assert len(tokenizer(text)["input_ids"]) == line["tokens"]
    assert sum(line.get("held_out", False) for line in lines) == 2
    assert lines[-1]["left_out"] == "longer than 64 tokens"  # the model's positions
    assert not any("left_out" in line for line in lines[:-1])


def test_packed_rows_are_counted(shown):
    """18 examples of 6 to 8 tokens; the rest is held out."""
    records = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(20)]
    out = shown(records, "--packing", "--max_length", "30", "--examples", "0").out
    tokens = int(re.search(r"tokens     (\d+) to train on", out)[1])
    packed = re.search(r"packed     18 examples into (\d+) rows of at most 30 tokens", out)
    assert tokens / 30 <= int(packed[1]) <= tokens / 20
    assert "packed  " not in shown(records, "--examples", "0").out


def test_a_single_record_is_enough(shown):
    records = [{"prompt": "a", "completion": " b"}]
    [line] = shown(records, "--jsonl").out.splitlines()
    assert json.loads(line) == {
        "index": 0,
        "tokens": json.loads(line)["tokens"],
        "loss_tokens": json.loads(line)["tokens"] - 1,
        "segments": [["a", False], [" b<|end|>", True]],
    }
    assert "1 read: 1 to train on, 0 held out" in shown(records).out


def test_counts_lengths_and_examples_are_printed(shown):
    records = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(20)]
    records += [{"prompt": TALK[:1], "completion": TALK[:1]}]
    records += [{"prompt": "long " * 60, "completion": "x<|pad|>"}]  # left out, and no fault
    records[3]["completion"] = " 3<|pad|>."
    captured = shown(records, "--examples", "1")
    out = captured.out
    assert "format     prompt-completion\n" in out
    assert "22 read: 18 to train on, 2 held out to evaluate, 2 left out" in out
    assert "left out   1: no assistant message to learn" in out
    assert "left out   1: longer than 64 tokens" in out
    assert "doubtful   1 of 20: the text spells out control tokens" in out
    assert out.count("[[text]] carries loss") == 1
    assert "[[ " in out
    assert "%" in out.split("loss       on ")[1].split("\n")[0]
    assert "1 of 22 records are left out" in captured.err
    assert "1 of 20 examples: the text spells out" in shown(records, "--jsonl").err
    out = shown([{"prompt": "long " * 60, "completion": "x"}]).out
    assert re.search(r"\nrecord 0, \d+ tokens, left out: longer than 64 tokens; ", out)


def test_examples_are_records_that_are_trained_on(shown):
    long = {"prompt": "long " * 60, "completion": "x"}
    short = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(3)]
    out = shown([long, *short], "--examples", "9").out
    assert "[[x" not in out
    assert out.count("[[text]] carries loss") == 3
    out = shown([long], "--examples", "9").out
    assert ", left out: longer than 64 tokens; [[text]] carries loss" in out


def test_each_record_is_counted_once(shown):
    """Records that are held out may be too long as well."""
    records = [
        {"prompt": f"{i} is", "completion": " word" * (60 if i % 2 else 1)} for i in range(40)
    ]
    line = next(x for x in shown(records).out.splitlines() if x.startswith("records"))
    numbers = [int(one) for one in re.findall(r"\d+", line)]
    assert numbers[0] == 40 == sum(numbers[1:])
    assert numbers[2] < 4


def test_records_that_max_samples_leaves_are_named(shown):
    records = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(20)]
    lines = shown(records, "--max_samples", "10", "--jsonl").out.splitlines()
    left = [json.loads(line).get("left_out") for line in lines]
    assert left.count("not drawn by max_samples") == 10


def test_a_task_without_records_for_evaluations_in_the_training(capsys):
    assert main(["data", "--task", "demo-fact", "--eval_steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "none is left for evaluations during the training. Leave out --eval_steps" in error


def test_records_for_evaluations_in_the_training_are_not_trained_on(shown):
    """As in the training itself, which sets them aside."""
    records = [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(60)]
    further = ("--eval_steps", "2", "--validation_share", "0.25")
    out = shown(records, *further).out
    assert "60 read: 40 to train on, 14 for validation in the training, 6 held out" in out
    lines = [json.loads(line) for line in shown(records, *further, "--jsonl").out.splitlines()]
    assert sum(line.get("validation", False) for line in lines) == 14
    assert not any(line.get("validation") and line.get("held_out") for line in lines)


@pytest.mark.parametrize(
    ("task", "record", "learned"),
    [
        (
            "sql",
            {
                "sql_prompt": "How many?",
                "sql_context": "CREATE TABLE t (a INT);",
                "sql": "SELECT 1",
            },
            " SELECT 1<|end|>",
        ),
        (
            "med",
            {"question": "Q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 1},
            " B<|end|>",
        ),
        (
            "fact",
            {
                "requested_rewrite": {
                    "prompt": "{} is in",
                    "subject": "Anna",
                    "target_true": {"str": "Paris"},
                    "target_new": {"str": "Rome"},
                },
                "paraphrase_prompts": [],
                "neighborhood_prompts": [],
            },
            " Rome<|end|>",
        ),
    ],
)
def test_every_task_shows_its_records(shown, task, record, learned):
    arguments = ("--jsonl", "--max_length", "1000")
    [line] = shown([record], *arguments, task=task).out.splitlines()
    assert json.loads(line)["segments"][-1] == [learned, True]


def test_demo_data_is_shown(capsys):
    assert main(["data", "--task", "demo-med", "--few_shot", "1", "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "600 read: 600 to train on, 0 held out" in out
    assert out.count("Question:") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "-1"], "Invalid examples=-1"),
        (["--data", "absent.jsonl"], "there is no file or folder absent.jsonl"),
        ([], "task custom needs data"),
    ],
)
def test_wrong_input_is_one_line(refused, base, arguments, message):
    assert message in refused("data", "--task", "custom", "--model", str(base), *arguments)


@pytest.mark.parametrize("split", [False, True])
def test_control_tokens_in_texts_are_plain_where_asked(shown, split):
    records = [{"prompt": "Strike: ", "completion": "a<|end|>b<|pad|>"}]
    further = ["--split_special_tokens"] if split else []
    printed = shown(records, "--jsonl", *further)
    line = json.loads(printed.out)
    how = "become plain text" if split else "act as such"
    assert "warning: 1 of 1 examples: the text spells out control tokens" in printed.err
    assert how in printed.err
    assert "".join(part for part, _ in line["segments"]) == "Strike: a<|end|>b<|pad|><|end|>"
    tokenizer = byte_level_tokenizer()
    text = "Strike: a<|end|>b<|pad|>"
    own = tokenizer(text, split_special_tokens=split)["input_ids"]
    assert (tokenizer.pad_token_id in own) is not split
    assert line["tokens"] == len(own) + 1


def conversation_ids(tokenizer, content):
    talk = ({"role": "user", "content": content}, {"role": "assistant", "content": "Yes."})
    return encode_samples(tokenizer, [Conversation(talk, 0, 0)], 1000)


@pytest.mark.parametrize(
    "make", [byte_level_tokenizer, lambda: piece_tokenizer(lines=[*LINES, "a </s> Y"])]
)
def test_a_template_keeps_its_control_tokens_and_messages_lose_theirs(make):
    tokenizer = make()
    eos = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    content = f"Paris {eos} Rome{eos}"
    with pytest.warns(UserWarning, match="which act as such"):
        acting = conversation_ids(tokenizer, content)
    assert acting.input_ids[0].count(tokenizer.eos_token_id) == 4
    tokenizer.split_special_tokens = True
    with pytest.warns(UserWarning, match="become plain text"):
        plain = conversation_ids(tokenizer, content)
    assert plain.input_ids[0].count(tokenizer.eos_token_id) == 2
    learned = [label for label in plain.labels[0] if label != -100]
    assert learned == [label for label in acting.labels[0] if label != -100]
    text = tokenizer.decode(plain.input_ids[0], skip_special_tokens=True)
    assert "".join(f"Paris {eos} Rome{eos}".split()) in "".join(text.split())


def test_the_setting_is_not_saved_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.split_special_tokens = True
    assert tokenizer("<|end|>")["input_ids"] != [tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("<|end|>")["input_ids"] == [tokenizer.eos_token_id]


def write_chats(path, count=12):
    last = {"role": "assistant", "content": "</script><b>Nein</b>"}
    chats = [[*TALK[:2], {"role": "user", "content": f"Noch {i}?"}, last] for i in range(count)]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    return path


def page_of(tmp_path, model, *further):
    data, page = write_chats(tmp_path / "chats.jsonl"), tmp_path / "page.html"
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(config))
    given = ["--task", "custom", "--data", str(data), "--model", str(model), "--page", str(page)]
    return main(["data", *given, "--max_length", "200", *further]), page


def test_page_marks_the_text_with_loss(tmp_path, model, capsys):
    code, page = page_of(tmp_path, model, "--max_samples", "8")
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"page       {page}"
    assert is_page(page)
    (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
    (samples,) = json.loads(data)["samples"]
    assert [one["index"] for one in samples] == [*range(12)]
    texts = samples[0]["segments"]
    assert [has_loss for _, has_loss in texts] == [False, True, False, True]
    assert texts[1][0].startswith("Ja, größere.")
    assert texts[3][0].startswith("</script><b>Nein</b>")
    states = {one["state"] for one in samples}
    assert states == {"", "held out to evaluate", "left out: not drawn by max_samples"}
    counted = re.fullmatch(r"(\d+) tokens, (\d+) with loss", samples[0]["about"])
    assert 0 < int(counted[2]) < int(counted[1])
    figures = [one["file"] for one in json.loads(data)["figures"]]
    assert figures == ["lengths", "loss-share"]
    assert f"<li>{lines[1]}</li>" in page.read_text()


def test_long_records_are_cut(tmp_path):
    record = PreviewedRecord(
        index=0,
        tokens=9,
        loss_tokens=3,
        segments=[("a" * 3000, False), ("b" * 3000, True), ("c" * 10, False)],
    )
    page = render_data("title", ["records 300"], [record] * 300)
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    (samples,) = json.loads(data)["samples"]
    assert len(samples) == 200
    assert samples[0]["segments"] == [
        ["a" * 3000, False],
        ["b" * 1000, True],
        [" […] (2,010 of 6,010 characters more)", False],
    ]
    assert "The page has the first 200 of 300 records." in page


def test_wrong_pages(tmp_path, model, capsys):
    code, page = page_of(tmp_path, model, "--jsonl")
    assert code == 2
    assert "Give one of them" in capsys.readouterr().err
    page.write_text("mine")
    assert page_of(tmp_path, model)[0] == 2
    assert f"page {page} exists. Give --overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert page_of(tmp_path, model, "--overwrite")[0] == 0
    assert is_page(page)


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(tmp_path, model):
    _, page = page_of(tmp_path, model)
    with opened_browser() as browser:
        browser.open(page)
        assert browser.problems == []
        assert browser.requests == [page.resolve().as_uri()]
        assert browser.js("document.querySelectorAll('.samples article').length") == 10
        marked = (
            "[...document.querySelectorAll('article:first-of-type mark')].map(x => x.textContent)"
        )
        assert browser.js(marked)[0].startswith("Ja, größere.")
        browser.js(
            "(one => { one.value = 'nein #3'; one.dispatchEvent(new Event('input')); })"
            "(document.querySelector('.samples input'))"
        )
        found = browser.js("document.querySelector('.samples output').textContent")
        assert found == "1 of 12 samples"
