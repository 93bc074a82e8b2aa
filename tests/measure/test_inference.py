import contextlib

import pytest
import torch

from molf.errors import InputError
from molf.measure import EvaluationSettings
from molf.measure.inference import (
    for_each_batch,
    inference,
    inner_model,
    last_logits,
    length_limit,
)
from tiny_models import tiny_llama, tiny_qwen2

MODEL = torch.nn.Module()  # in one process it only shows that it is not in shards


def test_batches_are_of_similar_length_the_longest_first():
    batches = []
    for_each_batch(MODEL, [3, 9, 1, 7, 8], 2, batches.append, "x")
    assert batches == [[1, 4], [3, 0], [2]]


def test_a_batch_out_of_memory_is_halved_and_nothing_is_lost():
    done, sizes = [], []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("too big")
        done.extend(batch)

    shown = []
    for_each_batch(MODEL, [5] * 10, 8, run, "x", lambda *state: shown.append(state))
    assert sorted(done) == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]  # a size that failed is not tried again
    assert shown[-1] == ("x", 10, 10)


def test_one_row_out_of_memory_is_an_error():
    def run(batch):
        raise torch.OutOfMemoryError("too big")

    with pytest.raises(torch.OutOfMemoryError):
        for_each_batch(MODEL, [1, 1, 1], 2, run, "x")


def test_every_module_gets_its_own_mode_back():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    try:
        with contextlib.suppress(RuntimeError), inference(model):
            assert not any(module.training for module in model.modules())
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("modes come back after errors, too")
        assert model.training
        assert model.model.layers[1].mlp.training
        assert not model.model.layers[0].mlp.training
    finally:
        model.eval()


def test_the_smaller_limit_counts():
    assert length_limit(tiny_llama(), 50) == 50
    assert length_limit(tiny_llama(), 1000) == 128


def test_only_the_asked_positions_reach_the_vocabulary():
    model = tiny_qwen2()
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    with inference(model):
        logits = last_logits(model, [[5, 6, 7, 8], [9, 10]], 1, keep=2)
    hook.remove()
    assert shapes == [(2, 2, 512)]
    assert logits.shape == (2, 2, 512)


def test_peft_models_are_looked_into():
    import peft

    model = peft.get_peft_model(
        type(tiny_llama())(tiny_llama().config), peft.LoraConfig(target_modules=["q_proj"])
    )
    assert inner_model(model).__class__.__name__ == "LlamaForCausalLM"
    with inference(model):
        assert last_logits(model, [[5, 6, 7]], 0, keep=1).shape == (1, 1, 512)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_length": 1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=f"Invalid {next(iter(wrong))}="):
        EvaluationSettings(**wrong)
