"""The examples that a run keeps: a few, each record once, cut, with the text that carries loss."""

import json

from molf.tasks import TaskOptions, load_task
from molf.tasks.preview import PreviewedRecord, examples_of_run
from tiny_models import CHATML, byte_level_tokenizer


def task_of(tmp_path, records, weight=""):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_task(TaskOptions(name="custom", data=f"{path}{weight}"))


def test_examples_of_chats(tmp_path):
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": "One.", "weight": number % 2},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": f"{number}."},
            ]
        }
        for number in range(200)
    ]
    task = task_of(tmp_path, records)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    kept = [place for place in range(len(task.training_samples)) if place != 0]
    found = examples_of_run(tokenizer, task.training_samples, kept)
    assert len(found) == 40
    assert found[0].index == task.training_samples[1].record
    for one in found:
        learned = [text.split("<|im_end|>")[0] for text, has_loss in one.segments if has_loss]
        assert learned == [*(["One."] if one.index % 2 else []), f"{one.index}."]
        assert 0 < one.loss_tokens < one.tokens
        assert PreviewedRecord.of_record(json.loads(json.dumps(one.record()))) == one


def test_each_record_once_and_its_first_tokens(tmp_path):
    records = [{"prompt": f"{n} is", "completion": " x" * 3000} for n in range(4)]
    task = task_of(tmp_path, records, ":5")
    kept = range(len(task.training_samples))
    assert len(kept) == 15
    found = examples_of_run(byte_level_tokenizer(), task.training_samples, kept)
    assert [one.index for one in found] == sorted({one.index for one in found})
    assert len(found) == 3
    for one in found:
        *whole, (more, has_loss) = one.segments
        assert "".join(text for text, _ in whole).endswith(" x x x")
        assert more == f" […] ({one.tokens - 1000:,} of {one.tokens:,} tokens more)"
        assert one.loss_tokens == one.tokens - 2  # without the prompt
        assert not has_loss
