"""The shipped recipes: what they say, that they run, and the commands around them."""

import csv
import json
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from molf.cli import main
from molf.cli.app import app
from molf.cli.recipes.shipped import recipe_names, shipped_recipe
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import METHOD, TrainSettings
from molf.tasks import TASKS

NAMES = recipe_names()
METHODS = ("fft", "lora", "molf", "molf-e")
FORMS = (*METHODS, "molf-dropout")
DOCS = Path(__file__).parents[2] / "docs"
MODELS = {
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
}
PAPER = [
    (task, method, model) for task in ("sql", "med", "fact") for method in FORMS for model in MODELS
]
DATA = {
    "sql": "gretelai/synthetic_text_to_sql",
    "med": "openlifescienceai/medmcqa",
    "fact": "https://rome.baulab.info/data/dsets/counterfact.json",
}
DEMOS = [name for name in NAMES if name.startswith("demo-")]
REAL_CELLS = [name for name in NAMES if name.startswith("cell-real-")]
CELLS = [name for name in NAMES if name.startswith("cell-") and name not in REAL_CELLS]
BOARD = [name for name in NAMES if name.startswith("peft-math-")]
CHATS = [name for name in NAMES if name.endswith("-chat")]


def settings_of(*tokens: str) -> TrainSettings:
    """The settings that `molf train` with these arguments stands for."""
    _, bound, _ = app.parse_args(["train", *tokens], exit_on_error=False, print_error=False)
    return bound.arguments["settings"]


def recipe_settings(name: str) -> TrainSettings:
    return settings_of("--config", name)


def check_trained_like_the_paper(settings: TrainSettings, *, dropout: bool = True) -> None:
    """Batch, schedule, decay, experts and precision of the paper's runs, whatever the cell."""
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    assert batch == 32
    assert settings.warmup_ratio == 0.1
    assert settings.lr_scheduler_type == "cosine"
    assert (settings.adam_beta1, settings.adam_beta2) == (0.9, 0.999)
    assert (settings.weight_decay, settings.lora_weight_decay) == (0.1, 0.01)
    assert settings.seed == 42
    config = settings.method_config
    if settings.method == "molf":
        assert (config.ranks, config.alphas) == ((128,), (32.0,))
        assert config.lora_dropout == (0.05 if dropout else 0)  # the paper's, or folded
        assert (config.score, config.top_k) == ("epd", 1)
    elif settings.method == "molf-e":
        assert (config.ranks, config.alphas) == ((32, 128), (32.0, 32.0))
        assert config.lora_dropout == 0.05
        assert (config.score, config.top_k) == ("epd", 1)
        assert config.freezes_rest
    elif settings.method == "lora":
        assert (config.ranks, config.alphas) == ((32,), (11.0,))
        assert config.lora_dropout == 0.05
    if config is not None:
        assert config.use_rslora
        assert config.target_modules == "all-linear"
        assert config.exclude_modules == ("lm_head",)


@pytest.mark.parametrize("cell", PAPER, ids="-".join)
def test_cell_of_the_paper(cell):
    task, method, model = cell
    settings = recipe_settings("-".join(cell))
    expected = (task, method.removesuffix("-dropout"), MODELS[model])
    assert (settings.task, settings.method, settings.model) == expected
    assert settings.data == DATA[task]
    check_trained_like_the_paper(settings, dropout="dropout" in method)
    assert settings.quantised is None
    assert settings.per_device_train_batch_size == 8
    assert settings.num_train_epochs == 2
    assert settings.learning_rate == 5e-5
    assert settings.lora_learning_rate in (None, 5e-5)
    assert settings.bf16 is True
    assert settings.max_samples is None
    assert settings.max_eval_samples is None


OTHERS = (*DEMOS, *CELLS, *REAL_CELLS, *BOARD)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHERS])
def test_variant_trains_like_the_paper(name):
    check_trained_like_the_paper(recipe_settings(name), dropout="-dropout-" in name)


def test_variant_on_four_bits():
    (name,) = (name for name in NAMES if "-4bit" in name)
    assert name.endswith("-24gb")
    settings = recipe_settings(name)
    assert settings.load_in_4bit
    assert settings.method == "molf-e"
    assert settings.merge_base == "dequantised"


@pytest.mark.parametrize("name", DEMOS)
def test_demo_states_the_defaults(name):
    """A demo's recipe and its task without a recipe must be the same training."""
    now = datetime(2026, 1, 1)
    settings = recipe_settings(name)
    plain = TrainSettings(task=settings.task, method=settings.method)
    found, wanted = (replace(resolve(each, now), output_dir=None) for each in (settings, plain))
    assert found == wanted


def test_every_demo_task_has_its_recipes():
    demos = [task for task in TASKS if task.startswith("demo-")]
    assert sorted(DEMOS) == sorted(f"{task}-{method}" for task in demos for method in METHODS)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CELLS])
def test_recipe_is_valid_and_explains_itself(name, capsys):
    assert main(["recipes", "validate", name]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{name}: ok (molf train)\n"
    assert captured.err == ""
    lines = shipped_recipe(name).read_text().splitlines()
    assert lines[0] == f"# molf train --config {name}.yaml"
    assert lines[1].endswith(".")
    assert "# What to change first:" in lines
    options = yaml.safe_load("\n".join(lines))
    bare = name.removeprefix("cell-real-").removeprefix("peft-")
    assert bare.startswith(f"{options['task']}-{options['method']}")
    if options["method"] == "molf":
        dropout = "0.05" if "-dropout-" in name else "0"
        assert any(line.startswith(f"lora_dropout: {dropout}  # ") for line in lines)
    # Stated in the file, so that a recipe stays what it is when a default changes.
    assert {"num_train_epochs", "per_device_train_batch_size", "seed"} <= options.keys()
    assert {"learning_rate", "lora_learning_rate"} & options.keys()


def options_of_methods_and_studies() -> set[str]:
    """The options that a study gives to a method or to a trial, and no cell."""
    hints = get_type_hints(TrainSettings, include_extras=True)
    groups = {
        name: [getattr(part, "group", ()) for part in getattr(hint, "__metadata__", ())]
        for name, hint in hints.items()
    }
    found = {name for name, of in groups.items() if any(METHOD in (g or ()) for g in of)}
    assert {"method", "ranks", "score"} <= found
    return found | {"learning_rate", "lora_learning_rate", "seed", "eval_part", "output_dir"}


@pytest.mark.parametrize("name", CELLS)
def test_cell_is_valid_and_leaves_method_rates_and_seed_to_the_study(name, capsys):
    assert main(["recipes", "validate", name]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{name}: ok (molf train)\n", "")
    lines = shipped_recipe(name).read_text().splitlines()
    assert lines[0] == f"# molf train --config {name}.yaml"
    assert lines[1].endswith(".")
    options = yaml.safe_load("\n".join(lines))
    assert not options_of_methods_and_studies() & options.keys()
    assert options["task"].startswith("demo-")
    assert {"num_train_epochs", "per_device_train_batch_size"} <= options.keys()
    assert f"`{name}`" in (DOCS / "cells.md").read_text()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=[pytest.mark.slow] * ((name, part) != (CELLS[0], "test")))
        for name in CELLS
        for part in ("validation", "test")
    ],
)
def test_cell_runs_with_other_methods(name, part, tmp_path, short_text):
    short = ["--max_steps", "1", "--max_eval_samples", "5", "--max_samples", "16"]
    run = tmp_path / "run"
    given = ["--method", "lora", "--eval_part", part, "--output_dir", str(run)]
    assert main(["train", "--config", name, *short, *given]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["eval_part"] == part
    # The task's own description, which names the part if it is not the test set.
    described = config["run"]["task"]
    assert described.get("eval_part", "test") == part
    assert ("validation part" in described.get("evaluated_on", "")) == (part == "validation")
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (row["eval_part"], row["method"], row["steps"]) == (part, "lora", "1")
    measured = json.loads((run / "eval.json").read_text())
    for metrics in (measured["before"], measured["after"]):
        assert next(iter(metrics.values()))["count"] == 5
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 5


def test_at_most_eight_cells_span_both_parts_of_the_question():
    assert 6 <= len(CELLS) <= 8


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "demo-fact-molf")) for name in DEMOS],
)
def test_demo_recipe_runs(name, tmp_path, short_text):
    run = tmp_path / "run"
    short = ["--max_steps", "2", "--max_samples", "20", "--max_eval_samples", "5"]
    assert main(["train", "--config", name, *short, "--output_dir", str(run)]) == 0
    assert (run / "model" / "model.safetensors").is_file()


def test_cells_on_a_real_model_differ_in_the_method_alone():
    """The rates are those that docs/cells-real.md gives figures for."""
    rates = {"fft": (5e-5, None), "lora": (None, 5e-4), "molf": (5e-5, 5e-4)}
    expected = {"fact": (64, None, 1024, 8), "med": (160, 300, 52, 2)}
    assert sorted(REAL_CELLS) == sorted(f"cell-real-{t}-{m}" for t in expected for m in rates)
    for task, size in expected.items():
        for method, (rate, lora_rate) in rates.items():
            settings = recipe_settings(f"cell-real-{task}-{method}")
            found = (settings.max_samples, settings.max_eval_samples, settings.max_length)
            assert (*found, settings.num_train_epochs) == size
            assert settings.per_device_train_batch_size == 16
            assert settings.gradient_accumulation_steps == 1
            assert (settings.learning_rate, settings.lora_learning_rate) == (rate, lora_rate)
            assert settings.data is None  # given by the user
            if method != "fft":
                assert (settings.method_config.ranks, settings.method_config.alphas) == (
                    (16,),
                    (8,),
                )


@pytest.mark.parametrize("method", ["fft", "lora", "molf"])
def test_the_recipes_of_pefts_comparison_differ_in_the_method_alone(method):
    """The values are those of PEFT's default_training_params.json and of its experiments."""
    assert len(BOARD) == 3
    settings = recipe_settings(f"peft-math-{method}-llama-3.2-3b")
    assert (settings.task, settings.method) == ("math", method)
    assert settings.model == "meta-llama/Llama-3.2-3B"
    assert (settings.data, settings.eval_data) == ("meta-math/MetaMathQA", "openai/gsm8k:main")
    assert (settings.max_steps, settings.per_device_train_batch_size) == (5000, 4)
    assert settings.gradient_accumulation_steps == 1
    assert settings.max_samples == settings.max_steps * 4
    assert (settings.max_length, settings.max_grad_norm, settings.seed) == (768, 1, 0)
    assert (settings.lr_scheduler_type, settings.warmup_ratio) == ("cosine", 0.1)
    assert (settings.dtype, settings.bf16) == ("bfloat16", True)
    rates = {"fft": (1e-5, None), "lora": (None, 1e-4), "molf": (1e-5, 1e-4)}
    assert (settings.learning_rate, settings.lora_learning_rate) == rates[method]
    decays = {"fft": (0.1, 0.01), "lora": (0.1, 0.1), "molf": (0.1, 0.1)}
    assert (settings.weight_decay, settings.lora_weight_decay) == decays[method]
    if method == "lora":
        config = settings.method_config
        assert (config.ranks, config.alphas, config.use_rslora) == ((32,), (64.0,), False)
        assert config.lora_dropout == 0
        assert list(config.target_modules) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("method", ["fft", "lora", "molf"])
def test_recipe_of_pefts_comparison_runs(method, tmp_path):
    from checkpoints import write_checkpoint
    from question_records import gsm8k, maths, write

    model = write_checkpoint(tmp_path / "model")
    data = write(tmp_path / "train.jsonl", maths(12))
    test = write(tmp_path / "test.jsonl", [gsm8k(f"{i} pens?", i) for i in range(4)])
    given = ["--model", str(model), "--data", data, "--eval_data", test, "--max_steps", "2"]
    run = tmp_path / "run"
    name = f"peft-math-{method}-llama-3.2-3b"
    assert main(["train", "--config", name, *given, "--output_dir", str(run)]) == 0
    assert json.loads((run / "eval.json").read_text())["after"]["accuracy"]["count"] == 4


@pytest.mark.parametrize(("task", "method"), [("fact", "lora"), ("med", "molf")])
def test_cell_on_a_real_model_runs(task, method, tmp_path):
    from checkpoints import write_checkpoint, write_facts
    from question_records import med

    model, data = write_checkpoint(tmp_path / "model"), tmp_path / "data.jsonl"
    if task == "fact":
        write_facts(data)
    else:
        data.write_text("\n".join(json.dumps(med(f"Where is {n}?", n % 4)) for n in range(40)))
    given = ["--model", str(model), "--data", str(data), "--max_length", "128"]
    run = tmp_path / "run"
    name = f"cell-real-{task}-{method}"
    assert (
        main(["train", "--config", name, *given, "--max_steps", "2", "--output_dir", str(run)]) == 0
    )
    metrics = json.loads((run / "eval.json").read_text())["after"]
    assert {"fact": "es", "med": "accuracy_logprob"}[task] in metrics


@pytest.mark.parametrize("name", CHATS)
def test_chat_recipe_runs(name, tmp_path):
    from checkpoints import make_model
    from tiny_models import CHATML, byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    make_model("qwen2").save_pretrained(tmp_path / "chat")
    data = tmp_path / "conversations.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Hello {number}"},
                    {"role": "assistant", "content": "Good day"},
                ]
            }
        )
        for number in range(40)
    ]
    data.write_text("\n".join(lines))
    short = ["--max_steps", "2", "--ranks", "4", "--alpha", "4", "--max_length", "128"]
    given = ["--model", str(tmp_path / "chat"), "--data", str(data)]
    output = ["--output_dir", str(tmp_path / "run")]
    assert main(["train", "--config", name, *given, *short, *output]) == 0
    assert (tmp_path / "run" / "eval.json").is_file()


def test_ls(capsys):
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "method", "task", "model", "description"]
    assert [line.split()[0] for line in lines[1:]] == NAMES
    line = next(line for line in lines if line.startswith("sql-molf-qwen2.5-3b "))
    for word in ("molf", "sql", "Qwen/Qwen2.5-3B", "paper"):
        assert word in line


def test_ls_as_json(capsys):
    assert main(["recipes", "ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == NAMES
    assert list(rows[0]) == ["name", "method", "task", "model", "description"]


def test_a_file_here_comes_before_the_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "demo-fact-molf"]) == 0
    path = Path("demo-fact-molf.yaml")
    path.write_text(path.read_text().replace("seed: 42", "seed: 7"))
    assert recipe_settings("demo-fact-molf.yaml").seed == 7
    assert recipe_settings("demo-fact-molf").seed == 42
    assert settings_of("--config", "demo-fact-lora.yaml").method == "lora"


@pytest.mark.parametrize(
    ("destination", "written", "command"),
    [
        ([], "demo-fact-molf.yaml", "molf train --config demo-fact-molf.yaml"),
        (["mine.yaml"], "mine.yaml", "molf train --config mine.yaml"),
        (["my recipe.yaml"], "my recipe.yaml", "molf train --config 'my recipe.yaml'"),
        (
            ["folder"],
            "folder/demo-fact-molf.yaml",
            "molf train --config folder/demo-fact-molf.yaml",
        ),
    ],
)
def test_cp(tmp_path, monkeypatch, capsys, destination, written, command):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert main(["recipes", "cp", "demo-fact-molf", *destination]) == 0
    assert capsys.readouterr().out == f"{command}\n"
    first, _, rest = Path(written).read_text().partition("\n")
    assert first == f"# {command}"
    assert rest == shipped_recipe("demo-fact-molf").read_text().partition("\n")[2]


def test_cp_overwrites_only_when_told(refused, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    error = refused("recipes", "cp", "demo-fact-molf", "mine.yaml")
    assert "mine.yaml exists" in error
    assert "--overwrite" in error
    assert path.read_text() == "seed: 1\n"
    assert main(["recipes", "cp", "demo-fact-molf", "mine.yaml", "--overwrite"]) == 0
    assert "method: molf" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cp", "demo-fact-mlof"], ["demo-fact-mlof", "demo-fact-molf", "molf recipes ls"]),
        (["cp", "demo-fact-molf", "nowhere/x.yaml"], ["nowhere/x.yaml", "no directory nowhere"]),
        (["cp"], ["NAME"]),
        (["list"], ["list", "ls"]),
        (["validate"], ["Give the recipes"]),
        (["validate", "demo-fact-mlof"], ["demo-fact-mlof", "demo-fact-molf"]),
        (["validate", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    ],
)
def test_wrong_input_of_the_commands(refused, arguments, words):
    error = refused("recipes", *arguments)
    for word in words:
        assert word in error


def test_config_names_no_recipe(refused):
    error = refused("train", "--config", "demo-fact-mlof")
    assert "Did you mean demo-fact-molf" in error


@pytest.fixture
def validate(tmp_path, capsys, monkeypatch):
    """Validate a text; return the exit code and the lines of output and of errors."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *others: str) -> tuple[int, list[str], list[str]]:
        Path("recipe.yaml").write_text(text)
        code = main(["recipes", "validate", "recipe.yaml", *others])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_validate_lists_every_error(validate):
    code, out, errors = validate(
        "save_total_limit: 2\n"  # allowed, as save_steps comes later
        "lora_dropout: 0.05\n"  # allowed, as the method comes later
        "rank: 4\n"
        "learning_rate: 0\n"
        "seed: 1.5\n"
        "method: lora\n"
        "ranks: [4, 0]\n"
        "warmup_ratio: 2\n"
        "few_shot: 3\n"
        "bf16: maybe\n"
        "save_steps: 10\n"
        "training_args: {optin: 3, dataloader_num_workers: many, neftune_noise_alpha: 5}\n",
        "demo-fact-molf",
    )
    assert code == 2
    assert out == ["demo-fact-molf: ok (molf train)"]
    expected = [
        ("rank:", "--ranks"),
        ("learning_rate:", "greater than 0"),
        ("seed:", "whole number"),
        ("ranks:", "at least 1"),
        ("warmup_ratio:", "[0, 1)"),
        ("few_shot:", "task=demo-fact"),
        ("bf16:", "maybe"),
        ("training_args.optin", "no argument of TRL"),
        ("training_args.dataloader_num_workers", "many"),
    ]
    assert len(errors) == len(expected)
    for line, words in zip(errors, expected, strict=True):
        assert line.startswith(f"molf: error: recipe.yaml: {words[0]}"), line
        assert words[1] in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: poetry\n", ["task", "poetry", "custom"]),
        ("method: magic\n", ["method", "magic", "molf"]),
        ("method: molf\nload_in_4bit: true\n", ["load_in_4bit", "full expert", "molf-e"]),
        ("top_k: 3\nranks: 4\n", ["top_k=3"]),
        ("model: [a, b]\n", ["model", "[", "str"]),
        ("training_args: 3\n", ["training_args", "3"]),
        ("seed: 1\nseed: 2\n", ["seed", "twice"]),
        ("- a\n", ["name: value"]),
        ("a: [1\n", ["not YAML", "line"]),
        ("# molf routing --config recipe.yaml\nseed: 1\n", ["routing", "takes no recipe"]),
        ("# molf eval MODEL --config recipe.yaml\ntask: [sql, sql]\n", ["task", "twice"]),
        ("# molf eval MODEL --config recipe.yaml\nmethod: lora\n", ["method"]),
    ],
)
def test_validate_finds(validate, text, words):
    code, out, errors = validate(text)
    assert code == 2
    assert out == []
    assert len(errors) == 1
    for word in ["recipe.yaml", *words]:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("", "train"),
        ("top_k: 2\nranks: [4, 8]\n", "train"),
        ("task: custom\nmodel: m\ndata: [a.jsonl, 'b.jsonl:2']\nmax_time: 1h\n", "train"),
        ("# molf eval MODEL --config recipe.yaml\ntasks: [sql, med]\nfew_shot: 2\n", "eval"),
        ("# molf eval MODEL --task med --config recipe.yaml\nfew_shot: 5\n", "eval"),
    ],
)
def test_validate_accepts(validate, text, command):
    assert validate(text) == (0, [f"recipe.yaml: ok (molf {command})"], [])


def test_validate_warns_of_experts_that_all_win(validate):
    """Once, and of all options together: `top_k` alone would leave nothing to choose."""
    code, out, lines = validate("method: molf-e\ntop_k: 2\nranks: [4, 8]\n")
    assert (code, len(out), len(lines)) == (0, 1, 1)
    assert lines[0].startswith("molf: warning: recipe.yaml: top_k=2 is the number of experts")
    assert validate("top_k: 2\nranks: [4, 8]\n")[2] == []


def test_validate_warns_of_what_train_would(validate):
    code, out, lines = validate("method: fft\nranks: 4\ntask: fact\n")
    assert code == 0
    assert len(out) == 1
    assert lines[0].startswith("molf: warning: recipe.yaml: Without effect with method=fft: ranks")
    assert "--model" in lines[1]


def test_validate_takes_a_runs_configuration(validate, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = resolve(TrainSettings(output_dir=tmp_path / "run"), datetime(2026, 1, 1))
    text = yaml.safe_dump({**settings.as_options(), "run": {"task": {"name": "demo-fact"}}})
    assert validate(text)[0] == 0


@pytest.mark.parametrize(
    "arguments", [["--max_steps", "1.5"], ["--seed", "0.5"], ["--save_steps", "2.5"]]
)
def test_fractions_are_not_rounded(refused, arguments):
    error = refused("train", *arguments)
    assert arguments[0] in error
    assert f'"{arguments[1]}" must be a whole number' in error


def test_whole_numbers_may_have_a_point():
    assert settings_of("--max_steps", "3.0").max_steps == 3
    assert settings_of("--num_train_epochs", "1.5").num_train_epochs == 1.5
