"""How options are spelled, read and shown, on the command line and in recipes."""

import pytest

from molf.cli import main
from molf.cli.app import app
from molf.job.settings.settings import TrainSettings


def read(*tokens: str) -> TrainSettings:
    """The settings that a command line stands for."""
    from molf.cli.app import join_booleans

    _, bound, _ = app.parse_args(
        join_booleans(["train", *tokens]), exit_on_error=False, print_error=False
    )
    return bound.arguments.get("settings", TrainSettings())


def test_defaults():
    assert read() == TrainSettings()


def test_underscores_and_dashes():
    expected = TrainSettings(learning_rate=1e-3, use_rslora=False)
    assert read("--learning_rate", "1e-3", "--no-use_rslora") == expected
    assert read("--learning-rate", "1e-3", "--no-use-rslora") == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("1h30m", 5400), ("1.5 h", 5400), ("2d", 172_800), ("45", 45), ("7s", 7)],
)
def test_times(text, seconds):
    assert read("--max_time", text).max_time == seconds


@pytest.mark.parametrize("flag", [["--bf16", "true"], ["--bf16", "True"], ["--bf16=true"]])
def test_booleans_with_a_value(flag):
    assert read(*flag).bf16 is True
    assert read("--bf16", "false", "--seed", "1").bf16 is False


def test_the_value_of_a_boolean_is_no_prompt():
    from molf.cli.app import join_booleans

    joined = join_booleans(["generate", "model", "--chat", "false", "--jsonl", "true", "false"])
    assert joined == ["generate", "model", "--chat=false", "--jsonl=true", "false"]


def test_lists():
    settings = read("--ranks", "32,128", "--alpha", "16", "--report_to", "wandb,tensorboard")
    assert settings.ranks == (32, 128)
    assert settings.alpha == (16.0,)
    assert settings.report_to == ("wandb", "tensorboard")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,mlp.up_proj", ("q_proj", "mlp.up_proj")),
        (r".*\.(q|k)_proj", r".*\.(q|k)_proj"),
        (r"h\.\d{1,2}\.c_fc", r"h\.\d{1,2}\.c_fc"),
    ],
)
def test_module_patterns(text, patterns):
    assert read("--target_modules", text).target_modules == patterns


def test_training_args():
    settings = read("--training_args.optim_target", "x", "--training_args.neftune_noise_alpha=5")
    assert settings.training_args == {"optim_target": "x", "neftune_noise_alpha": "5"}


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_recipe(recipe):
    path = recipe(
        "method: lora\n"
        "learning_rate: 5e-5\n"
        "ranks: [32, 128]\n"
        "target_modules: q_proj,v_proj\n"
        "use-rslora: false\n"
        "max_steps:\n"
        "training_args:\n"
        "  lr_scheduler_kwargs: {min_lr: 0.1}\n"
        "  dataloader_num_workers: 2\n"
    )
    settings = read("--config", path, "--method", "molf")
    assert settings == TrainSettings(
        method="molf",
        learning_rate=5e-5,
        ranks=(32, 128),
        target_modules=("q_proj", "v_proj"),
        use_rslora=False,
        training_args={"lr_scheduler_kwargs": '{"min_lr": 0.1}', "dataloader_num_workers": "2"},
    )


@pytest.mark.parametrize("ranks", ["32,128", "'32,128'", "[32, 128]"])
def test_recipe_lists(recipe, ranks):
    assert read("--config", recipe(f"ranks: {ranks}\n")).ranks == (32, 128)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 4\n", ["rank", "--ranks"]),
        ("learning_rate: fast\n", ["learning_rate", "fast"]),
        ("learning_rate: [1, 2]\n", ["learning_rate", "[1, 2]"]),
        ("ranks: [4, x]\n", ["ranks", "4,x"]),
        ("bf16: maybe\n", ["bf16", "maybe"]),
        ("task: poetry\n", ["poetry", "custom"]),
        ("ranks: [1, 2\nseed: 3\n", ["not YAML", "line 2"]),
        ("- a\n", ["name: value", "list"]),
        ("config: other.yaml\n", ["another config"]),
        ("seed: 1\nseed: 2\n", ["'seed' is given twice", "line 2"]),
        ("1: 2\n", ["1 is not the name of an option"]),
        ("? [a]\n: 2\n", ["not YAML"]),
        ("seed: \0\n", ["not YAML"]),
        ("ranks: []\n", ["ranks", "whole numbers"]),
    ],
)
def test_wrong_recipe(refused, recipe, text, words):
    path = recipe(text)
    error = refused("train", "--config", path)
    for word in [path, *words]:
        assert word in error


BOMB = "training_args:\n  a0: &a0 [x]\n" + "".join(
    f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!binary aGVsbG8=\n", ["!!binary", "line 1"]),
        ("seed: !!set {1, 2}\n", ["!!set"]),
        ("!!set {seed}\n", ["name: value"]),
        ("seed: !!python/name:os.system\n", ["python/name"]),
        (BOMB, ["more than 10000 values"]),
        (BOMB.replace("[x]", "[[], []]"), ["more than 10000 values"]),
        ("training_args: &a\n  x: *a\n", ["nested too deeply"]),
        ("seed: &a [*a]\n", ["a list in a list", "seed"]),
        ("seed: " + "[" * 600 + "\n", ["nested too deeply"]),
        ("training_args: {x: {y: .nan}}\n", ["not finite"]),
        ("training_args: {x: [" + "9" * 5000 + "]}\n", ["invalid"]),
        ("seed: {a: 1}\n", ["a mapping", "seed"]),
        ("ranks: [4, ~]\n", ["an empty entry", "ranks"]),
        ("<<: {seed: 1}\n", ["<< is not the name of an option"]),
        ("? {a: 1}\n: 2\n", ["no name"]),
        ('model: "\\ud800"\n', ["half a character"]),
        ('model: "a\\0"\n', ["null byte"]),
        ('model: "\\U00110000"\n', ["not YAML"]),
        ("%YAML 1." + "9" * 5000 + "\n---\nseed: 1\n", ["not YAML"]),
        ("".join(f"a{n}: 1\n" for n in range(200)), ["200 names", "100"]),
        ("seed: 1 # " + "x" * 70_000, ["longer than 65,536 bytes"]),
        ("ranks: [" + "4," * 2000 + "4]\n", ["2001 values for ranks", "1000"]),
        ("plan: 3\n", ["plan"]),
        ("seed: 1\n---\nseed: 2\n", ["another document"]),
        ("seed: " + "9" * 5000 + "\n", ["seed"]),
        ("max_steps: " + "9" * 30 + "\n", ["max_steps", "2**63"]),
        ("ranks: [" + "9" * 400 + "]\n", ["ranks", "2**63"]),
    ],
)
def test_odd_recipe(refused, recipe, text, words):
    path = recipe(text)
    error = refused("train", "--config", path)
    assert len(error) < 3000
    for word in [path, *words]:
        assert word in error


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("model: 1.10\ntask: sql\n", "model", "1.10"),
        ("model: 2026-01-01\n", "model", "2026-01-01"),
        ("model: 1_000\n", "model", "1_000"),
        ("model: no\n", "model", "no"),
        ("model: 007\n", "model", "007"),
        ("seed: 010\n", "seed", 10),
        ("seed: 1_000\n", "seed", 1000),
        ("bf16: on\n", "bf16", True),
        ("dry_run: yes\n", "dry_run", True),
        ("load_in_4bit: false\n", "load_in_4bit", False),
        ("learning_rate: 1e-5\n", "learning_rate", 1e-5),
        ("learning_rate: &rate 3.0e-05\nlora_learning_rate: *rate\n", "lora_learning_rate", 3e-5),
        ("model: ~\n", "model", None),
        ("save_steps:\n", "save_steps", None),
        ("run: &a [*a]\nseed: 3\n", "seed", 3),
        (
            "training_args: {neftune_noise_alpha: 5, lr_scheduler_kwargs: {x: 0.5, y: [yes, ~]}}\n",
            "training_args",
            {
                "neftune_noise_alpha": "5",
                "lr_scheduler_kwargs": '{"x": 0.5, "y": [true, null]}',
            },
        ),
    ],
)
def test_values_are_what_is_written(recipe, text, name, value):
    found = getattr(read("--config", recipe(text)), name)
    assert (found, type(found)) == (value, type(value))


def test_options_called_as_commands_are(recipe):
    """There is a `molf data`; the option of that name is no less an option of recipes."""
    assert read("--config", recipe("task: sql\ndata: mine.jsonl\n")).data == "mine.jsonl"


def test_recipe_that_never_ends(refused):
    assert "is a device" in refused("train", "--config", "/dev/zero")


def test_recipe_of_an_unknown_user(refused):
    assert "~nobody-here/a.yaml" in refused("train", "--config", "~nobody-here/a.yaml")


def test_empty_lists_in_a_recipe(recipe):
    settings = read("--config", recipe("exclude_modules: []\nreport_to: []\n"))
    assert settings.exclude_modules == ()
    assert settings.report_to == ()


def test_recipe_with_a_byte_order_mark(recipe):
    assert read("--config", recipe("\ufeffseed: 3\r\n")).seed == 3


def test_missing_recipe(refused):
    assert "nowhere.yaml" in refused("train", "--config", "nowhere.yaml")


def test_help_groups_the_options(capsys):
    assert main(["train", "--help-all"]) == 0
    out = capsys.readouterr().out
    groups = ("Data", "Model", "Method", "Optimization", "Evaluation", "Output")
    positions = [out.index(f" {group} ") for group in groups]
    assert positions == sorted(positions)
    assert "--lora_learning_rate" in out
    assert "[default: cosine]" in out


def test_warns_of_options_without_effect(capsys):
    """In one line; here an error follows, as there is no model."""
    assert main(["train", "--method", "fft", "--ranks", "4", "--task", "fact"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "molf: warning: Without effect with method=fft: ranks."
