"""Tokens of all examples: made by several processes, and kept for later runs."""

import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from molf.data import encoding
from molf.data.encoding import encode_samples
from molf.data.rows import Rows
from molf.data.tokens import cache, processes
from molf.data.tokens.cache import cached, key_of
from molf.data.tokens.processes import encode_in_processes
from molf.errors import InputError
from molf.tasks import TaskOptions, load_task
from tiny_models import CHATML, byte_level_tokenizer


def chat_tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def samples(tmp_path):
    """40 conversations, of which two are longer than 99 tokens, and others spell out a token."""
    path = tmp_path / "records.jsonl"
    lines = []
    for i in range(40):
        answer = "Ä" * 60 if i in (7, 20) else f"{i}" + "<|end|>" * (i % 2)
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    path.write_text("".join(lines))
    return load_task(TaskOptions(name="custom", data=str(path))).training_samples


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    for module in (encoding, processes):
        monkeypatch.setattr(module, "PART", 6)


def fields(encoded):
    return (
        list(encoded.input_ids),
        list(encoded.labels),
        list(encoded.kept),
        encoded.left_out,
        encoded.longest,
        encoded.faults,
    )


@pytest.fixture
def one(samples):
    return encode_samples(chat_tokenizer(), samples, 99)


def test_several_processes_make_the_tokens_of_one(samples, one, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    shown = []
    found = encode_in_processes(
        chat_tokenizer(), samples, 99, 2, lambda done, total: shown.append((done, total))
    )
    assert fields(found) == fields(one)
    assert found.left_out == 2
    assert found.faults
    assert shown == [(i, len(samples)) for i in range(0, len(samples), 6)]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_errors_of_the_processes_are_those_of_one(samples):
    with pytest.raises(InputError, match="samples are longer than max_length=2 tokens"):
        encode_in_processes(chat_tokenizer(), samples, 2, 2, lambda done, total: None)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"Record .*the tokenizer's chat template refuses"):
        encode_in_processes(tokenizer, samples, 99, 2, lambda done, total: None)


def test_an_interrupt_ends_the_processes(samples, monkeypatch):
    # Parts that no process would finish.
    monkeypatch.setattr(processes, "encode_part", lambda *given: threading.Event().wait())

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "joined", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_in_processes(chat_tokenizer(), samples, 99, 2, lambda done, total: None)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_one_clear_line(samples, monkeypatch):
    # The forked processes have this function.
    monkeypatch.setattr(processes, "encode_part", lambda *given: os._exit(9))
    with pytest.raises(InputError, match=r"was killed.*smaller --dataset_num_proc"):
        encode_in_processes(chat_tokenizer(), samples, 99, 2, lambda done, total: None)


def test_processes_that_cannot_be_started_are_one_clear_line(samples, monkeypatch):
    fork, started = os.fork, []

    def limited():
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(fork())
        return started[-1]

    monkeypatch.setattr("os.fork", limited)
    with pytest.raises(InputError, match=r"cannot be started: .*unavailable\. Give a smaller"):
        encode_in_processes(chat_tokenizer(), samples, 99, 2, lambda done, total: None)
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()


class Encode:
    """Encodes the samples, and counts its calls."""

    def __init__(self, samples):
        self.samples = samples
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return encode_samples(chat_tokenizer(), self.samples, 99)


def test_the_cache_returns_the_same_tokens(samples, one, tmp_path):
    folder, encode = tmp_path / "a/tokens", Encode(samples)
    key = key_of(chat_tokenizer(), samples, 99)
    made = cached(folder, key, encode)
    read = cached(folder, key, encode)
    assert fields(made) == fields(read) == fields(one)
    assert encode.calls == 1
    [path] = folder.iterdir()
    assert path.name.startswith(f"{key}-")
    assert made.source == f"Tokens: kept in {folder} ({path.stat().st_size / 1e3:,.0f} kB)."
    assert read.source == f"Tokens: read from {path}."
    assert isinstance(read.input_ids, Rows)
    assert read.lengths() == one.lengths()
    assert read.input_ids.as_arrow().to_pylist() == list(one.input_ids)


def test_the_key_is_that_of_everything_the_tokens_depend_on(samples, monkeypatch):
    def split(tokenizer):
        tokenizer.split_special_tokens = True

    def with_template(text):
        return lambda tokenizer: setattr(tokenizer, "chat_template", text)

    def with_token(tokenizer):
        tokenizer.add_tokens(["new"])

    def padded(tokenizer):  # as an evaluation leaves it
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)

    def key(change=lambda tokenizer: None, chosen=samples, most=99):
        tokenizer = chat_tokenizer()
        change(tokenizer)
        return key_of(tokenizer, chosen, most)

    assert key() == key() == key(padded)
    today = with_template(CHATML + "{{ strftime_now('%d') }}")
    others = [
        key(split),
        key(with_template(CHATML + " ")),
        key(with_token),
        key(most=98),
        key(chosen=samples[1:]),
        key(chosen=samples[::-1]),
        key(today),
    ]
    monkeypatch.setattr(cache, "date", type("", (), {"today": lambda: "2020-01-01"}))
    others.append(key(today))
    assert len({key(), *others}) == 1 + len(others)
    monkeypatch.setattr(cache, "version", lambda name: "0")
    assert key() not in others


@pytest.mark.parametrize("change", ["cut", "bit", "empty"])
def test_a_damaged_file_is_made_again(samples, one, tmp_path, change):
    encode = Encode(samples)
    cached(tmp_path / "tokens", "key", encode)
    [path] = (tmp_path / "tokens").iterdir()
    content = path.read_bytes()
    place = content.index(b"\0\0\0", 2000)
    path.write_bytes(
        {
            "cut": content[:-9],
            "bit": content[:place] + b"\1" + content[place + 1 :],
            "empty": b"",
        }[change]
    )
    with pytest.warns(UserWarning, match="is damaged: its tokens are made again"):
        found = cached(tmp_path / "tokens", "key", encode)
    assert fields(found) == fields(one)
    assert encode.calls == 2
    assert fields(cached(tmp_path / "tokens", "key", encode)) == fields(one)
    assert encode.calls == 2
    assert [path.read_bytes()] == [one.read_bytes() for one in (tmp_path / "tokens").iterdir()]


def test_a_damaged_file_beside_a_whole_one_is_not_read(samples, one, tmp_path, recwarn):
    """Its name has another content, such as that of an earlier version of Arrow."""
    encode, damaged = Encode(samples), tmp_path / "key-0000.arrow"
    damaged.write_bytes(b"ARROW1")
    with pytest.warns(UserWarning, match="is damaged"):
        cached(tmp_path, "key", encode)
    assert not damaged.exists()
    damaged.write_bytes(b"ARROW1")
    recwarn.clear()
    assert fields(cached(tmp_path, "key", encode)) == fields(one)
    assert encode.calls == 1
    assert not recwarn.list


def test_leftovers_of_a_killed_process_are_not_read(samples, one, tmp_path):
    folder = tmp_path / "tokens"
    for name in (".key.1234000.tmp", ".key.lock"):
        (folder / name).mkdir(parents=True) if name.endswith("tmp") else (folder / name).touch()
    (folder / ".key.1234000.tmp/tokens.arrow").write_bytes(b"half")
    assert fields(cached(folder, "key", Encode(samples))) == fields(one)
    assert len(list(folder.iterdir())) == 1


def test_tokens_that_cannot_be_kept_are_used(samples, one, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept in token_cache .*file/tokens"):
        found = cached(tmp_path / "file/tokens", "key", Encode(samples))
    assert fields(found) == fields(one)


def test_of_two_runs_at_once_one_makes_the_tokens(samples, one, tmp_path):
    begun, encode = threading.Event(), Encode(samples)

    def slow():
        begun.set()
        begun.clear()
        begun.wait(0.3)  # the other run waits for the lock meanwhile
        return encode()

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(cached, tmp_path / "tokens", "key", slow) for _ in range(3)]
        found = [run.result(30) for run in runs]
    assert encode.calls == 1
    assert all(fields(each) == fields(one) for each in found)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
