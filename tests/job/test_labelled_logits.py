"""TRL's loss on a CPU: logits of labelled tokens alone, with the same loss and gradients."""

import pytest
import torch
from trl.trainer import utils

from checkpoints import make_model
from molf.cli import main
from molf.job.trainer.labelled_logits import labelled_logits


@pytest.fixture
def scored(monkeypatch):
    """The number of tokens of each call that computes logits."""
    rows = []
    function = utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *args):
            rows.append(hidden.shape[0])
            return function.apply(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    return rows


def loss_and_gradients(labels):
    torch.manual_seed(0)
    model = make_model("qwen2")
    utils.add_fused_lm_head(model)
    ids = torch.arange(2 * 9).reshape(2, 9)
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_only_labelled_tokens_are_scored_with_the_same_result(scored):
    labels = torch.full((2, 9), -100)
    labels[0, 5:7] = torch.tensor([3, 4])
    labels[1, 8] = 5
    loss, gradients = loss_and_gradients(labels)
    with labelled_logits():
        compact_loss, compact_gradients = loss_and_gradients(labels)
    assert scored == [16, 3]
    assert compact_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compact_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_without_labels_has_no_loss(scored):
    with labelled_logits():
        loss, gradients = loss_and_gradients(torch.full((2, 9), -100))
    assert scored == [0]
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


def test_the_choice_of_trl_is_restored():
    chosen = utils._use_triton
    with pytest.raises(KeyError), labelled_logits():
        raise KeyError
    assert utils._use_triton is chosen
    assert not chosen(torch.device("cpu"))


def test_a_release_without_that_choice_trains_as_before(monkeypatch, scored):
    labels = torch.full((2, 9), -100)
    labels[0, 4] = 3
    monkeypatch.setattr("molf.job.trainer.labelled_logits._CHOICE", "_absent")
    with labelled_logits():
        loss_and_gradients(labels)
    assert scored == [16]
    assert not hasattr(utils, "_absent")


def test_a_run_scores_labelled_tokens_alone(tmp_path, scored):
    short = ["--max_steps", "2", "--max_samples", "8", "--max_eval_samples", "2"]
    batch = ["--per_device_train_batch_size", "4"]
    assert main(["train", *short, *batch, "--output_dir", str(tmp_path / "run")]) == 0
    # The first call is the check of the loss, which labels every token of one example.
    assert len(scored) == 3
    assert max(scored[1:]) <= 4 * 5
