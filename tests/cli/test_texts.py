"""`molf generate` and `molf chat`."""

from __future__ import annotations

import io
import json

import pytest
import torch

from checkpoints import make_model
from molf.cli import main
from molf.measure.generate import decode, generate_greedy
from tiny_models import CHATML, byte_level_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model with a chat template, and without one."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model("qwen2")
    for name, template in (("plain", None), ("chat", CHATML)):
        tokenizer = byte_level_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def loaded(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models / "plain")
    return model.eval(), AutoTokenizer.from_pretrained(models / "chat")


def greedy(loaded, text, tokens=8, special=True):
    model, tokenizer = loaded
    ids = tokenizer(text, add_special_tokens=special).input_ids
    (made,) = generate_greedy(model, tokenizer, [ids], max_new_tokens=tokens, batch_size=1)
    return decode(tokenizer, made)


@pytest.fixture
def generated(capsys):
    def run(*arguments):
        assert main(["generate", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_text_is_continued(generated, models, loaded):
    found = lines(generated(models / "plain", "Anna walks", "--max_new_tokens", 8, "--jsonl"))
    assert found == [{"prompt": "Anna walks", "answer": greedy(loaded, "Anna walks")}]


def test_the_streamed_answer_is_the_same(generated, models):
    given = (models / "plain", "Anna walks", "--max_new_tokens", 12)
    (entry,) = lines(generated(*given, "--jsonl"))
    from molf.shown import printable

    assert generated(*given) == printable(entry["answer"]) + "\n"


def test_a_prompt_is_a_users_message_where_there_is_a_template(generated, models, loaded):
    given = (models / "chat", "Who walks?", "--system", "Be brief.", "--max_new_tokens", 8)
    (entry,) = lines(generated(*given, "--jsonl"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who walks?"},
    ]
    text = loaded[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert entry["answer"] == greedy(loaded, text, special=False)
    (plain,) = lines(
        generated(models / "chat", "Who?", "--no-chat", "--max_new_tokens", 8, "--jsonl")
    )
    assert plain["answer"] == greedy(loaded, "Who?")


def test_drawn_answers_follow_the_seed(generated, models):
    given = (models / "plain", "Anna", "--temperature", 2, "--max_new_tokens", 12, "--jsonl")
    first, again, other = (generated(*given, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_prompts_of_files(generated, models, tmp_path, loaded):
    texts = tmp_path / "prompts.txt"
    texts.write_text("Anna walks\n\nAnna sits\n")
    given = ("--max_new_tokens", 4, "--jsonl")
    found = lines(generated(models / "plain", "First", "--prompts", texts, *given))
    assert [one["prompt"] for one in found] == ["First", "Anna walks", "Anna sits"]
    records = tmp_path / "records.jsonl"
    asked = {"role": "user", "content": "Who?"}
    records.write_text(
        json.dumps({"messages": [asked, {"role": "assistant", "content": "Anna."}]}) + "\n"
    )
    (entry,) = lines(generated(models / "chat", "--prompts", records, *given))
    assert entry["prompt"] == [asked]
    # As a list, and with a character that JSON allows and splitlines() splits at.
    whole = tmp_path / "records.json"
    whole.write_text(json.dumps([{"prompt": "Anna\u2028walks"}, {"prompt": "b"}], indent=1))
    found = lines(generated(models / "plain", "--prompts", whole, *given))
    assert [one["prompt"] for one in found] == ["Anna\u2028walks", "b"]
    records.write_text(json.dumps({"prompt": "Anna\u2028sits"}, ensure_ascii=False) + "\n")
    (entry,) = lines(generated(models / "plain", "--prompts", records, *given))
    assert entry["prompt"] == "Anna\u2028sits"


def test_several_answers_have_their_prompts(generated, models):
    out = generated(models / "plain", "Anna walks", "Anna sits", "--max_new_tokens", 2)
    assert [line for line in out.splitlines() if line.startswith("> ")] == [
        "> Anna walks",
        "> Anna sits",
    ]


def test_chat_keeps_its_history(models, loaded, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nWhere?\n/clear\nWho?\n/exit\nnever\n"))
    assert main(["chat", str(models / "chat"), "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out

    def answer(*messages):
        text = loaded[1].apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return greedy(loaded, text, 4, special=False)

    who, where = ({"role": "user", "content": text} for text in ("Who?", "Where?"))
    first = answer(who)
    second = answer(who, {"role": "assistant", "content": first}, where)
    from molf.shown import printable

    assert out == "".join(printable(text) + "\n" for text in (first, second, first))


def test_a_full_conversation_is_reported(models, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 5000 + "\n"))
    assert main(["chat", str(models / "chat")]) == 0
    assert "positions. /clear begins anew." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{plain}"], "Give a prompt"),
        (["generate", "{plain}", "x", "--temperature", "-1"], "Invalid temperature=-1"),
        (["generate", "{plain}", "x", "--top_p", "0.5"], "top_p has no effect"),
        (["generate", "{plain}", "x", "--max_new_tokens", "0"], "Invalid max_new_tokens=0"),
        (["generate", "{plain}", "x", "--chat"], "needs a chat template"),
        (["generate", "{plain}", "x", "--system", "s"], "system needs a chat"),
        (["generate", "{plain}", "--prompts", "{tmp}/none.txt"], "none.txt"),
        (["generate", "{plain}", "--prompts", "{tmp}/bad.jsonl"], "record 1 has neither"),
        (["generate", "{tmp}", "x"], "model"),
        (["chat", "{plain}"], "has no chat template"),
    ],
)
def test_wrong_input(models, tmp_path, capsys, arguments, words):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    places = {"plain": models / "plain", "tmp": tmp_path}
    assert main([one.format(**places) for one in arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_weights_in_another_type(generated, models):
    assert generated(models / "plain", "Anna", "--dtype", "bfloat16", "--max_new_tokens", 2)
    assert torch.get_default_dtype() == torch.float32
