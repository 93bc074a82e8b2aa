"""A loss or a gradient that is infinite or NaN in a training, with every method."""

import csv
import json
import math

import pytest
import torch
import yaml
from trl import SFTTrainer

from molf.cli import main
from molf.core.adamw import AdamW
from molf.core.optimizer import MoLFAdamW
from molf.job import training
from molf.job.settings.defaults import METHODS
from molf.job.trainer.step_guard import StepGuard
from slow_cases import slow_after

NAN = float("nan")
FORMS = {
    **{method: ["--method", method] for method in METHODS},
    "molf-dropout": ["--method", "molf", "--lora_dropout", "0.05"],
    "fft-bfloat16": ["--method", "fft", "--dtype", "bfloat16"],
}
FORMS["lora+"] += ["--loraplus_lr_ratio", "2"]
SKIP = ["--nonfinite", "skip"]
FLAT = ["--lr_scheduler_type", "constant", "--warmup_ratio", "0"]


@pytest.fixture(params=FORMS)
def form(request, assignment):
    further = ["--assignment", str(assignment)] if request.param == "hybrid" else []
    return [*FORMS[request.param], *further]


@pytest.fixture
def start(options, tmp_path, capsys):
    """Run a training; return the exit code, its directory and what it said."""

    def run(*further, steps=4):
        path = tmp_path / "run"
        given = [*options, *FLAT, "--max_steps", str(steps), *further, "--output_dir", str(path)]
        if "molf-e" in further:
            given += ["--ranks", "2,4"]
        code = main(last_of_each(given))
        said = capsys.readouterr()
        return code, path, said.out, said.err.splitlines()

    return run


def last_of_each(arguments):
    """An option may be given once."""
    command, *rest = " ".join(arguments).split(" --")
    pairs = [option.replace("=", " ").partition(" ") for option in rest]
    options = {name: value for name, _, value in pairs}
    return [
        command,
        *(f"--{name}={value}" if value else f"--{name}" for name, value in options.items()),
    ]


def errors(lines):
    return [line for line in lines if line.startswith("molf: error: ")]


def warned(lines):
    return [line for line in lines if line.startswith("molf: warning: ") and "skipped" in line]


def multiply(loss, model):
    return loss * NAN


def add(loss, model):
    """All gradients stay finite."""
    return loss + NAN


def spoil_gradient(loss, model):
    """The loss stays finite."""
    first = next(p for p in model.parameters() if p.requires_grad and p.dim() == 2)
    handle = first.register_hook(lambda grad: handle.remove() or grad * NAN)
    return loss


@pytest.fixture
def spoil(monkeypatch):
    """Spoil the losses of some forward passes, which count from 1, each in its way."""

    def patch(how):
        count = 0
        compute = SFTTrainer.compute_loss

        def compute_loss(self, model, inputs, *args, **kwargs):
            nonlocal count
            loss = compute(self, model, inputs, *args, **kwargs)
            count += 1
            return how[count](loss, model) if count in how else loss

        monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)

    return patch


class Watch(StepGuard):
    """Compares weights and state before and after each step."""

    unmoved: list[int]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.before = everything(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        after = everything(model, optimizer)
        same = after.keys() == self.before.keys() and all(
            torch.equal(after[key], self.before[key]) for key in after
        )
        if same:
            type(self).unmoved.append(state.global_step)


def everything(model, optimizer):
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}/{key}"] = torch.as_tensor(value).clone()
    return found


def test_a_hopeless_rate_stops_at_the_first_loss_that_is_no_number(form, start):
    code, path, _, lines = start(*form, "--learning_rate=1e30", "--lora_learning_rate=1e30")
    assert code == 1
    (error,) = errors(lines)
    assert "Step 2 of 4: Non-finite" in error
    assert "learning_rate" in error
    assert not (path / "model").exists()
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").open()]
    assert steps == [1]


@pytest.mark.parametrize("form", slow_after(5, reversed(FORMS)), indirect=True)
def test_a_skipped_step_moves_nothing(form, start, spoil, monkeypatch):
    """One of the two micro-batches of step 2 has a bad gradient, one of step 4 a bad loss."""
    monkeypatch.setattr(training, "StepGuard", Watch)
    monkeypatch.setattr(Watch, "unmoved", [], raising=False)
    spoil({4: spoil_gradient, 7: add})
    code, _, out, lines = start(
        *form,
        *SKIP,
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps=2"),
        steps=5,
    )
    assert code == 0
    assert Watch.unmoved == [2, 4]
    (warning,) = warned(lines)
    assert "Step 2 of 5 is skipped: Non-finite gradient in " in warning
    assert "(5 steps, 2 of them skipped, " in out


def test_records_say_what_was_skipped(start, spoil):
    spoil({2: add})
    code, path, _, _ = start(*SKIP)
    assert code == 0
    entries = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [entry.get("skipped_steps") for entry in entries] == [None, 1, 1, 1]
    losses = [entry["loss"] for entry in entries]
    assert losses[1] is None
    with (path.parent / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["skipped_steps"] == "1"
    assert float(row["training_loss"]) == pytest.approx((losses[0] + losses[2] + losses[3]) / 3)
    config = yaml.safe_load((path / "config.yaml").read_text())
    recorded = config["run"]["training"]
    assert (recorded["steps"], recorded["skipped_steps"]) == (4, 1)


def test_the_mean_loss_of_an_interval_is_that_of_the_steps_taken(start, spoil):
    spoil({3: add})
    code, path, _, _ = start(*SKIP, "--logging_steps", "4", "--lora_learning_rate", "1e-3")
    assert code == 0
    entries = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [math.isfinite(entry["loss"]) for entry in entries] == [True, True]


@pytest.mark.parametrize("method", ["fft", "molf"])
def test_the_limit_is_of_steps_in_a_row(method, start, spoil):
    spoil(dict.fromkeys((1, 3, 5, 6), multiply))
    code, _, _, lines = start("--method", method, *SKIP, "--max_skipped_steps", "2", steps=8)
    assert code == 1
    (error,) = errors(lines)
    assert "Step 6 of 8: Non-finite loss (nan); 2 steps in a row skipped" in error
    assert len(warned(lines)) == 1


def test_ten_in_a_row_by_default(start, spoil):
    spoil(dict.fromkeys(range(1, 30), multiply))
    code, _, _, lines = start("--method", "lora", *SKIP, steps=12)
    assert code == 1
    (error,) = errors(lines)
    assert "Step 10 of 12: Non-finite loss (nan); 10 steps in a row" in error
    assert "No weight has moved yet" in error


@pytest.mark.parametrize(
    ("method", "clip"), [("fft", "1"), ("lora", "0"), ("molf", "1"), ("molf-e", "0")]
)
def test_the_bad_gradient_is_named(method, clip, start, spoil):
    """Clipping would have spread it over all."""
    spoil({2: spoil_gradient})
    code, _, _, lines = start("--method", method, "--max_grad_norm", clip)
    assert code == 1
    (error,) = errors(lines)
    assert "Step 2 of 4: Non-finite gradient in " in error
    assert " more" not in error


def test_steps_in_the_backward_pass_stop_before_anything_moves(start, spoil, monkeypatch):
    moved = []
    take = AdamW._take
    monkeypatch.setattr(AdamW, "_take", lambda self, *given: moved.append(1) or take(self, *given))
    spoil({1: multiply})
    code, _, _, lines = start("--optimizer_in_backward")
    assert code == 1
    assert "Step 1 of 4: Non-finite loss (nan)." in errors(lines)[0]
    assert "--nonfinite" not in errors(lines)[0]
    assert not moved


def test_steps_in_the_backward_pass_name_a_gradient(start, spoil):
    spoil({2: spoil_gradient})
    code, _, _, lines = start("--optimizer_in_backward")
    assert code == 1
    assert "Step 2 of 4: Non-finite gradient in model.embed_tokens.weight;" in errors(lines)[0]


@pytest.mark.parametrize("method", ["fft", "lora", "molf"])
def test_weights_that_the_last_update_overflows(method, start):
    """No gradient and no loss tells of it."""
    code, path, _, lines = start(
        "--method", method, "--learning_rate=1e39", "--lora_learning_rate=1e39", steps=1
    )
    assert code == 1
    (error,) = errors(lines)
    assert "Step 1 of 1, with non-finite weights in " in error
    assert "an update was too large" in error
    assert not (path / "model").exists()


def test_skipping_cannot_mend_weights(start):
    code, _, _, lines = start("--method", "fft", "--learning_rate=1e39", *SKIP)
    assert code == 1
    assert "Step 2 of 4: Non-finite loss (nan), with non-finite weights in" in errors(lines)[0]


def test_adalora_without_a_step_to_judge_by(start, spoil):
    spoil({1: multiply})
    code, _, _, lines = start("--method", "adalora", *SKIP, steps=3)
    assert code == 1
    assert "Step 2 of 3: AdaLoRA cannot tell which ranks matter" in errors(lines)[0]


def test_a_dry_run_stops_as_well(options, capsys):
    arguments = [*options, *FLAT, "--learning_rate=1e30", "--method", "fft", "--dry_run"]
    assert main(last_of_each(arguments)) == 1
    assert not torch.autograd._profiler_enabled(), "it would crash the process at its end"
    assert "Step 2 of 2: Non-finite loss (nan)." in errors(capsys.readouterr().err.splitlines())[0]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW, MoLFAdamW])
def test_the_host_waits_once_for_loss_and_gradients(optimizer_class, monkeypatch):
    """Where the optimizer reads its gradients' norms, the loss goes with them."""
    from types import SimpleNamespace

    from molf.core.execute.eager import Eager
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    options = {"fused": True} if optimizer_class is torch.optim.AdamW else {}
    optimizer = (
        MoLFAdamW.from_model(model)
        if optimizer_class is MoLFAdamW
        else optimizer_class(model.parameters(), **options)
    )
    if isinstance(optimizer, AdamW):
        optimizer.executor = Eager(can_read=lambda device: False)  # as on an accelerator
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, method=method: reads.append(1) or method(*args)
        )
    watch = StepGuard(resolve(TrainSettings(method="fft"), training_time()))
    state = SimpleNamespace(global_step=0, max_steps=3)
    for _ in range(2):
        loss = model(torch.ones(3, 4)).square().sum()
        loss.backward()
        reads.clear()
        watch.add_loss(loss.detach())
        watch.clip(model.parameters(), 1.0)
        watch.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        optimizer.step()
        watch.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        assert len(reads) == 1
        optimizer.zero_grad()


def training_time():
    from datetime import datetime

    return datetime.now()


def test_clipping_is_torchs(monkeypatch):
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings

    watch = StepGuard(resolve(TrainSettings(method="fft"), training_time()))
    own, torchs = ([torch.nn.Parameter(torch.ones(n)) for n in (3, 5)] for _ in range(2))
    for parameters in (own, torchs):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.arange(len(parameter), dtype=torch.float32) + number
    assert watch.clip(own, 0.5) == torch.nn.utils.clip_grad_norm_(torchs, 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(own, torchs, strict=True))
