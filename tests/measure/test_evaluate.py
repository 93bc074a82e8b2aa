import json
import subprocess
import sys

import pytest
import torch

from molf.measure import EvaluationSettings, default_plain_text, evaluate
from molf.tasks import TaskOptions, load_task
from tiny_models import LINES, byte_level_tokenizer, tiny_qwen2


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": line[:20], "completion": line[20:]} for line in LINES[:5]]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return load_task(TaskOptions(name="custom", data=str(path), evaluation_only=True))


def test_every_evaluation_measures_forgetting(task):
    shown = []
    evaluation = evaluate(
        tiny_qwen2(),
        byte_level_tokenizer(),
        task,
        default_plain_text()[:2000],
        EvaluationSettings(max_length=120),
        progress=lambda what, done, total: shown.append((what, done == total)),
    )
    assert list(evaluation.metrics) == ["loss", "perplexity", "exact_match", "forgetting_loss"]
    assert {what for what, finished in shown if finished} == {"loss", "generation", "forgetting"}
    for metric in evaluation.metrics.values():
        assert metric.low <= metric.value <= metric.high


def test_a_model_can_be_trained_on_after_its_evaluation(task):
    model = type(tiny_qwen2())(tiny_qwen2().config).train()
    evaluate(model, byte_level_tokenizer(), task, "A plain text of some words.")
    assert model.training
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_records_are_checked_without_importing_torch(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "a b", "completion": "{i}"}}\n' for i in range(5)))
    code = (
        "import sys\n"
        "from molf.tasks import TaskOptions, load_task\n"
        "from molf.measure import EvaluationSettings\n"
        f"load_task(TaskOptions(name='custom', data={str(path)!r}))\n"
        "load_task(TaskOptions(name='demo-fact'))\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
