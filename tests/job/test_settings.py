"""Defaults by method and task, and what fits together."""

import re
import warnings
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS, METHOD, METHODS, ROUTED, defaults_for
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.sharding import check_launcher

NOW = datetime(2026, 1, 2, 3, 4, 5)


def resolved(**given):
    return resolve(TrainSettings(**{"task": "custom", "model": "owner/name", **given}), NOW)


@pytest.mark.parametrize(
    ("method", "ranks", "alphas", "dropout"),
    [
        ("molf", (128,), (32.0,), 0.0),
        ("molf-e", (32, 128), (32.0, 32.0), 0.05),
        ("lora", (32,), (11.0,), 0.05),
        ("lora+", (32,), (11.0,), 0.05),
        ("dora", (32,), (64.0,), 0.05),
        ("pissa", (32,), (32.0,), 0.0),
        ("eva", (32,), (1.0,), 0.0),
        ("adalora", (32,), (64.0,), 0.0),
    ],
)
def test_paper_defaults(method, ranks, alphas, dropout):
    settings = resolved(method=method)
    config = settings.method_config
    assert (config.ranks, config.alphas, config.lora_dropout) == (ranks, alphas, dropout)
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    assert batch == 32
    assert settings.num_train_epochs == 2
    assert settings.warmup_ratio == 0.1
    assert settings.learning_rate == settings.lora_learning_rate == 5e-5
    assert (settings.weight_decay, settings.lora_weight_decay) == (0.1, 0.01)


def test_lora_alpha_without_rank_stabilised_scaling():
    config = resolved(method="lora", ranks=(16,), use_rslora=False).method_config
    assert config.alphas == (32.0,)


@pytest.mark.parametrize("method", ADAPTERS)
def test_several_ranks_make_one_adapter(method):
    """The control for several experts: change `--method` alone."""
    with pytest.warns(UserWarning, match=re.escape("ranks=32,128 give it their sum, 160.")):
        settings = resolved(method=method, ranks=(32, 128))
    assert settings.ranks == settings.method_config.ranks == (160,)
    assert resolve(settings, NOW) == settings


def test_pissa_starts_at_scaling_one():
    for use_rslora in (True, False):
        config = resolved(method="pissa", ranks=(9,), use_rslora=use_rslora).method_config
        assert config.scalings == (1.0,)


def test_molf_e_with_one_expert_warns():
    with pytest.warns(UserWarning, match="ranks=8 has one expert, which always wins"):
        resolved(method="molf-e", ranks=(8,))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"method": "molf", "ranks": (4,), "top_k": 2}, "full, lora0_r4"),
        ({"method": "molf-e", "ranks": (4, 8), "top_k": 2}, "lora0_r4, lora1_r8"),
        ({"method": "molf", "ranks": (4, 8), "top_k": 2, "score": "lora"}, "lora0_r4, lora1_r8"),
    ],
)
def test_as_many_winners_as_experts_warn(given, names):
    text = rf"top_k=2 is the number of experts \({names}\).* nothing is routed"
    with pytest.warns(UserWarning, match=text):
        resolved(**given)


@pytest.mark.parametrize("score", ["full", "lora"])
def test_controls_choose_from_one_expert_by_design(score):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved(method="molf", score=score)


def test_options_of_checkpoints_need_checkpoints():
    given = {"save_total_limit": 3, "async_save": True, "on_save_error": "stop"}
    text = "Without effect without checkpoints: save_total_limit, async_save, on_save_error"
    with pytest.warns(UserWarning, match=text):
        resolved(method="fft", save_minutes=0.0, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved(method="fft", **given)
        resolved(method="fft", save_minutes=0.0, save_steps=5, **given)
        resolved(method="fft", save_minutes=0.0, keep_best=True, eval_steps=1, **given)


def test_a_limit_of_skipped_steps_needs_steps_to_be_skipped():
    with pytest.warns(UserWarning, match="Without effect with nonfinite=raise: max_skipped_steps"):
        resolved(method="fft", max_skipped_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolved(method="fft", nonfinite="skip", max_skipped_steps=3).nonfinite == "skip"


def test_molf_e_freezes_the_base_and_what_dense_training_needs_has_an_effect_without():
    assert resolved(method="molf-e").method_config.freezes_rest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = resolved(method="molf-e", freeze_rest=False, weight_decay=0.2)
    assert settings.method_config.freeze_base
    assert not settings.method_config.freezes_rest
    assert settings.weight_decay == 0.2


def test_experts_of_a_demo_have_one_scaling():
    """Whatever their ranks: else the lowest would win every update."""
    for ranks in (None, (4, 9, 16)):
        settings = resolve(TrainSettings(method="molf-e", ranks=ranks), NOW)
        assert set(settings.method_config.scalings) == {2.0}


def test_merge_base():
    assert resolved(method="lora").merge_base is None
    assert resolved(method="lora", load_in_4bit=True).merge_base == "dequantised"
    given = {"load_in_8bit": True, "merge_base": "original"}
    assert resolved(method="molf-e", **given).merge_base == "original"
    # The base may be stored quantised: whether it is, its configuration says.
    assert resolved(method="lora", merge_base="dequantised").merge_base == "dequantised"
    with pytest.warns(UserWarning, match="Without effect with method=dora: merge_base"):
        resolved(method="dora", merge_base="original")


def test_fft_has_no_adapter():
    settings = resolved(method="fft")
    assert settings.method_config is None
    assert settings.ranks is None


def test_given_values_win():
    settings = resolved(ranks=(4, 8), alpha=(1.0, 2.0), learning_rate=1e-3, num_train_epochs=1.0)
    assert settings.method_config.alphas == (1.0, 2.0)
    assert settings.learning_rate == 1e-3
    assert settings.num_train_epochs == 1


def test_demo_brings_model_and_rates():
    settings = resolve(TrainSettings(), NOW)
    assert Path(settings.model).parent.name == "world"
    assert settings.learning_rate > 1e-4
    assert settings.lora_learning_rate > settings.learning_rate


@pytest.mark.parametrize("method", [*ADAPTERS, "molf", "molf-e"])
def test_a_given_rate_holds_for_the_factors_too(method):
    """Above a demo's own rates as well; lora would else ignore `--learning_rate`."""
    settings = resolve(TrainSettings(method=method, learning_rate=1e-4), NOW)
    assert settings.lora_learning_rate == 1e-4
    settings = resolve(TrainSettings(method=method, lora_learning_rate=1e-4), NOW)
    assert settings.lora_learning_rate == 1e-4


UNUSED = {
    "fft": "ranks, match, loraplus_lr_ratio, score",
    "molf": "match, loraplus_lr_ratio",
    "molf-e": "weight_decay, match, loraplus_lr_ratio",
    "lora+": "weight_decay, score",
    "hybrid": "ranks, match, loraplus_lr_ratio, score",
}


@pytest.mark.parametrize("method", METHODS)
def test_options_without_effect_warn(method):
    given = {"score": "pfn", "weight_decay": 0.2, "ranks": (4, 8) if method == "molf-e" else (4,)}
    given |= {"match": "parameters", "loraplus_lr_ratio": 4.0}
    own = {"assignment": "a.yaml"} if method == "hybrid" else {}
    unused = UNUSED.get(method, "weight_decay, loraplus_lr_ratio, score")
    with pytest.warns(UserWarning, match=re.escape(f"method={method}: {unused}.")):
        settings = resolved(method=method, **given, **own)
    assert settings.score == ("pfn" if method in ROUTED else "epd")
    kept = {name: value for name, value in given.items() if name not in unused.split(", ")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved(method=method, **kept, **own)


@pytest.mark.parametrize(("schedule", "warns"), [("constant", True), ("cosine", False)])
def test_a_schedule_without_warm_up_warns(schedule, warns):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for ratio in (0.0, 0.1, 0.3):
            resolved(lr_scheduler_type=schedule, warmup_ratio=ratio)
    expected = [
        "Without effect with lr_scheduler_type=constant: warmup_ratio=0.3. Give "
        "constant_with_warmup."
    ]
    assert [str(one.message) for one in shown] == (expected if warns else [])


def test_default_directories_of_two_runs_in_one_second_differ():
    first, second = resolved().output_dir, resolved().output_dir
    assert first != second
    for path in (first, second):
        assert path.parent == Path("runs")
        assert re.fullmatch(r"custom-molf-name-20260102-030405-[0-9a-f]{6}", path.name)


def test_local_paths_hold_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "a.jsonl").touch()
    settings = resolved(model="base", data="./a.jsonl", eval_data="owner/name")
    assert settings.model == str(tmp_path / "base")
    assert settings.data == str(tmp_path / "a.jsonl")
    assert settings.eval_data == "owner/name"


def test_link_to_a_directory_means_that_directory(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    assert resolved(output_dir=tmp_path / "run").output_dir == tmp_path / "scratch"


def test_home_is_expanded(monkeypatch):
    """Recipes and quoted options come with `~`, which the trainer would expand and we would not."""
    monkeypatch.setenv("HOME", "/somewhere")
    settings = resolved(output_dir=Path("~/out"), data="~/a.jsonl", forgetting_data="a~b.txt")
    assert settings.output_dir == Path("/somewhere/out")
    assert settings.data == "/somewhere/a.jsonl"
    assert settings.forgetting_data == "a~b.txt"


def test_resolved_settings_are_settings():
    settings = resolved(method="lora")
    options = {option.name: getattr(settings, option.name) for option in fields(TrainSettings)}
    assert resolve(TrainSettings(**options), NOW) == settings
    assert replace(settings, seed=1).seed == 1


def test_every_method_is_described_and_has_defaults():
    assert set(METHODS) == set(METHOD) == {*ADAPTERS, *ROUTED, "fft", "hybrid"}


@pytest.mark.parametrize("task", ["demo-fact", "demo-med", "fact"])
def test_hybrid_has_the_rates_that_chose_its_layers(task):
    """A probe is a training of MoLF."""
    probe, hybrid = defaults_for("molf", task), defaults_for("hybrid", task)
    for name in ("learning_rate", "lora_learning_rate"):
        assert probe.get(name) == hybrid.get(name)


def test_wrong_values_are_found_without_the_command_line():
    with pytest.raises(InputError, match="method='magic'"):
        TrainSettings(method="magic")
    with pytest.raises(InputError, match="score='best'"):
        TrainSettings(score="best")


def test_wrong_optimizer_is_noticed():
    from molf.job.methods import Prepared
    from molf.job.trainer.callbacks import RoutingCallback

    weight = torch.nn.Parameter(torch.zeros(2))
    prepared = Prepared(None, (None, {}), torch.optim.AdamW, (), 0)
    callback = RoutingCallback(prepared, None, None)
    with pytest.raises(RuntimeError, match="SGD instead of AdamW"):
        callback.on_optimizer_step(None, None, None, optimizer=torch.optim.SGD([weight], lr=1.0))


def test_unrouted_layer_is_noticed():
    from molf import Decision, MoLFAdamW, MoLFConfig
    from molf.job.methods import Prepared
    from molf.job.trainer.callbacks import RoutingCallback

    model = torch.nn.Linear(4, 4)
    wrapped = torch.nn.Sequential(model)
    optimizer = MoLFAdamW.from_model(wrapped, MoLFConfig(ranks=(1,)))
    optimizer.routing = {"0": Decision(("full",), {"full": 1.0})}
    prepared = Prepared(wrapped, (None, {}), MoLFAdamW, ("0", "1"), 0)
    with pytest.raises(RuntimeError, match="1 of 2 layers are not routed"):
        RoutingCallback(prepared, None, None).on_optimizer_step(
            None, None, None, optimizer=optimizer
        )


def test_a_skipped_first_step_is_no_unrouted_layer():
    from molf.job.methods import prepare
    from molf.job.trainer.callbacks import RoutingCallback

    wrapped = torch.nn.Sequential(torch.nn.Linear(4, 4))
    prepared = prepare(wrapped, resolved(method="molf", ranks=(1,), nonfinite="skip"), None)
    factory, arguments = prepared.optimizer
    optimizer = factory()(wrapped, **arguments)
    wrapped(torch.full((1, 4), torch.inf)).sum().backward()
    with pytest.warns(UserWarning, match="Step skipped"):
        optimizer.step()
    callback = RoutingCallback(prepared, None, None)
    callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    assert optimizer.skipped_steps == 1


def test_autocast_is_possible_on_a_cpu():
    from molf.job.trainer import sft_config

    assert sft_config.sft_config(resolved(bf16=True)).bf16 is True


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_of_a_launcher_is_refused(precision, monkeypatch):
    from molf.job.trainer.sft_config import sft_config

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(InputError, match=f"ACCELERATE_MIXED_PRECISION={precision} .* without bf16"):
        sft_config(resolved(bf16=False))
    assert sft_config(resolved(bf16=True)).mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("USE_PARALLELISM_CONFIG", "true", "give --fsdp"),
        ("DYNAMO_BACKEND", "INDUCTOR", "give --training_args.torch_compile_backend"),
    ],
)
def test_options_of_a_launcher_are_refused(name, value, instead, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch` sets it
    check_launcher()
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match=f"ACCELERATE_{name}={value} .* {instead}"):
        check_launcher()


@pytest.mark.parametrize(
    ("steps", "given", "warns"),
    [
        (1, {}, True),
        (2, {}, False),
        (1, {"warmup_ratio": 0.0}, False),
        (1, {"lr_scheduler_type": "constant"}, False),
    ],
)
def test_warm_up_that_takes_all_steps(steps, given, warns):
    from molf.job.trainer.sft_config import sft_config
    from molf.job.training import _warn_of_warmup

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_warmup(steps, sft_config(resolved(**given)))
    assert [str(w.message) for w in caught if "warm-up" in str(w.message)] == [
        *(
            [
                "The warm-up takes the whole training (1 step) and starts at learning rate 0. Give "
                "--warmup_ratio 0 to train at the full rate from the start."
            ]
            if warns
            else []
        )
    ]


def test_training_args_win_over_our_own_choices():
    """What is passed through and not refused may not be overridden in silence."""
    from molf.job.trainer import sft_config

    settings = resolved(training_args={"run_name": "mine", "logging_first_step": "false"})
    config = sft_config.sft_config(settings)
    assert config.run_name == "mine"
    assert config.logging_first_step is False
