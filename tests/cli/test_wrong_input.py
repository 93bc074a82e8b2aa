"""Wrong input: one line with what was given and what is allowed, code 2, nothing written."""

import json
from pathlib import Path

import pytest

from molf.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --metod molf", ["--metod", "--method"]),
        ("trian", ["trian", "train"]),
        ("train --task poetry", ["poetry", "demo-fact", "custom"]),
        ("train --method magic", ["magic", "fft", "lora+", "adalora", "molf"]),
        ("train --match size", ["size", "rank", "parameters"]),
        ("train --loraplus_lr_ratio 0", ["loraplus_lr_ratio=0"]),
        ("train --score best", ["best", "epd", "pfn"]),
        ("train --save_dtype int8", ["int8", "bfloat16"]),
        ("train --epochs 3", ["--epochs. Did you mean --num_train_epochs?"]),
        ("train --batch-size 8", ["Did you mean --per_device_train_batch_size or --per_device_e"]),
        ("train --lr_scheduler_type up", ["up", "cosine", "warmup_stable_decay"]),
        ("train --lr_scheduler_type greedy", ["greedy", "--eval_steps"]),
        ("train --keep_best", ["keep_best", "--eval_steps"]),
        ("train --validation_data a", ["validation_data", "--eval_steps", "--eval_data"]),
        ("train --dataset_num_proc 0", ["dataset_num_proc=0", "greater than 0"]),
        ("train --training_args.dataset_num_proc 2", ["--dataset_num_proc"]),
        ("train --early_stopping_patience 3", ["early_stopping_patience", "--eval_steps"]),
        ("train --eval_steps 0", ["eval_steps=0", "greater than 0"]),
        ("train --fsdp_cpu_offload", ["fsdp_cpu_offload without fsdp", "--fsdp"]),
        ("train --eval_strategy often", ["often", "steps", "epoch"]),
        ("train --eval_strategy epoch --eval_steps 3", ["eval_steps=3", "eval_strategy=epoch"]),
        ("train --training_args.load_best_model_at_end true", ["--keep_best"]),
        ("train --max_time soon", ["--max_time", "soon", "90m"]),
        ("train --max_time 0", ["max_time=0", "greater than 0"]),
        ("train --max_time 3m2h", ["3m2h", "1h30m"]),
        ("train --learning_rate fast", ["learning_rate", "fast"]),
        ("train --learning_rate 0", ["learning_rate=0"]),
        ("train --learning_rate nan", ["learning_rate=nan"]),
        ("train --weight_decay -1", ["weight_decay=-1"]),
        ("train --warmup_ratio 1.5", ["warmup_ratio=1.5", "[0, 1)"]),
        ("train --num_train_epochs inf", ["num_train_epochs=inf"]),
        ("train --max_samples 0", ["max_samples=0"]),
        ("train --ranks 0", ["ranks=[0]", "at least 1"]),
        ("train --ranks 4,x", ["--ranks", "4,x", "whole numbers"]),
        ("train --ranks 4,,8", ["--ranks", "4,,8"]),
        ("train --ranks 4 --top_k 3", ["top_k=3", "2", "full, lora0_r4"]),
        ("train --ranks 4,8 --alpha 1,2,3", ["alpha", "2 ranks"]),
        ("train --method lora --ranks 4,0", ["ranks=[4, 0]", "at least 1"]),
        ("train --method dora --ranks 4,8 --alpha 1,2", ["alpha=1,2", "dora", "one adapter"]),
        ("train --lora_dropout 1", ["lora_dropout=1.0", "[0, 1)"]),
        ("train --method molf-e --score full", ["score='full'", "molf-e", "--method molf"]),
        ("train --method molf-e --top_k 3", ["top_k=3", "2", "lora0_r4, lora1_r16"]),
        ("train --method molf-e --alpha 1,2,3", ["alpha", "2 ranks"]),
        ("train --load_in_4bit --method fft", ["load_in_4bit", "fft", "quantised", "molf-e"]),
        ("train --load_in_8bit", ["load_in_8bit", "method=molf", "full expert", "molf-e", "lora"]),
        ("train --load_in_4bit --method dora", ["load_in_4bit", "dora", "merged", "lora+"]),
        ("train --load_in_4bit --method pissa", ["load_in_4bit", "pissa", "real numbers"]),
        ("train --load_in_4bit --method adalora", ["load_in_4bit", "adalora", "merged"]),
        ("train --method lora --load_in_4bit --load_in_8bit", ["load_in_4bit", "load_in_8bit"]),
        ("train --method lora --load_in_4bit --dtype bfloat16", ["dtype=bfloat16", "float32"]),
        (
            "train --method molf-e --load_in_4bit --no-freeze_rest",
            ["freeze_rest=False", "load_in_4bit"],
        ),
        (
            "train --method lora --load_in_4bit --merge_base half",
            ["half", "dequantised", "original"],
        ),
        ("export", ["RUN"]),
        ("export nowhere", ["nowhere", "not a directory"]),
        ("export . --what weights", ["weights", "model", "adapter"]),
        ("export . --dtype int8", ["int8", "bfloat16"]),
        ("export .", ["not a run", "config.yaml"]),
        (
            "export . --what adapter --rank 2 --save_rounding nearest",
            ["save_rounding=nearest with what=adapter"],
        ),
        ("train --resume", ["resume without output_dir", "--output_dir"]),
        ("train --resume --overwrite --output_dir x", ["resume with overwrite", "Leave one"]),
        ("train --resume --output_dir x", ["x holds no run to resume", "no options of a new one"]),
        ("plan --resume --output_dir x", ["x holds no run to resume"]),
        ("data --resume --output_dir x", ["x holds no run to resume"]),
        ("train --save_minutes -1", ["save_minutes=-1"]),
        ("train --on_save_error hope", ["hope", "continue", "stop"]),
        ("train --seed 1 --seed 2", ["--seed", "multiple times"]),
        ("train --seed 4294967296", ["seed=4294967296", "below 2**32"]),
        ("train --ranks=", ["--ranks", "whole numbers"]),
        ("train --model=", ["model", "empty"]),
        ("train --target_modules [q", ["target_modules='[q'", "not a regular expression"]),
        ("train --unheard_of 1", ["--unheard_of", "molf train --help"]),
        ("train --bf16 maybe", ["'maybe'", "molf train --help"]),
        ("train --report_to tensorboard,none", ["report_to=tensorboard,none", "stands alone"]),
        ("train surplus", ["surplus", "molf train --help"]),
        ("eval", ["--task"]),
        ("eval --task fact", ["model", "--predictions"]),
        (
            "eval --task fact --predictions p.jsonl --forgetting_data t.txt",
            ["forgetting_data=t.txt with predictions"],
        ),
        ("eval x --task fact --seed -1", ["seed=-1"]),
        ("eval x --task fact --seed 4294967296", ["seed=4294967296"]),
        ("eval x --task fact --max_samples 0", [" max_samples=0"]),
        ("eval x --task fact --max_length 1", ["max_length=1"]),
        ("eval x --task fact --per_device_eval_batch_size 0", ["per_device_eval_batch_size=0"]),
        ("plan --task fact", ["--model"]),
        ("plan --model x --method magic", ["magic", "fft", "lora", "molf", "molf-e"]),
        ("plan --model x --method dora", ["method=dora", "fft", "lora", "molf", "molf-e"]),
        ("plan --model x --per_device_train_batch_size 0", ["per_device_train_batch_size=0"]),
        ("plan --model x --max_length 0", ["max_length=0"]),
        ("plan --model x --max_length 1.5", ["max_length", "whole number"]),
        ("plan --model x --training_args.torch_compil 1", ["torch_compil", "torch_compile?"]),
        ("plan --model x --num_gpus 0", ["num_gpus=0"]),
        ("plan --model x --dtype int8", ["int8", "bfloat16"]),
        ("plan --model x --device tpu", ["tpu", "cuda", "cpu"]),
        ("plan --model ./nowhere/at/all", ["./nowhere/at/all"]),
        ("plan --model=", ["model", "empty"]),
        ("routing", ["RUN"]),
        ("routing nowhere", ["nowhere"]),
    ],
)
def test_options(refused, arguments, words):
    error = refused(*arguments.split())
    for word in words:
        assert word in error


@pytest.fixture
def train(refused, base, facts, tmp_path):
    """`molf train` on good data; a test gives one thing that is wrong."""

    def run(*wrong: str, **replaced: object) -> str:
        given = {"task": "fact", "model": base, "data": facts, "output_dir": tmp_path / "run"}
        options = [f"--{name}={value}" for name, value in {**given, **replaced}.items() if value]
        return refused("train", *options, *wrong)

    return run


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no file"]),
        (b"", ["is empty"]),
        (b'{"a": "\xff"}\n', ["not UTF-8"]),
        (b'{"a": 1}\nnot json\n', ["line 2", "not JSON"]),
        (b'{"requested_rewrite": {}}\n', ["record 0", "paraphrase_prompts"]),
    ],
)
def test_data(train, tmp_path, content, words):
    path = tmp_path / "wrong.jsonl"
    if content is not None:
        path.write_bytes(content)
    error = train(data=path)
    assert str(path) in error
    for word in words:
        assert word in error


def test_library_that_quantises_is_missing(train, monkeypatch):
    monkeypatch.setattr("molf.inputs.find_spec", lambda name: None)
    error = train("--method", "molf-e", "--load_in_4bit")
    assert "load_in_4bit needs bitsandbytes" in error
    assert "pip install 'molf[bitsandbytes]'" in error


@pytest.mark.parametrize("task", ["sql", "demo-sql", "demo-forms"])
@pytest.mark.parametrize("package", ["sqlglot", "sacrebleu"])
def test_library_that_compares_queries_is_missing(monkeypatch, capsys, tmp_path, task, package):
    monkeypatch.setattr("molf.inputs.find_spec", lambda name: None if name == package else True)
    for command in ("train", "data", "eval"):
        where = ["--output_dir", str(tmp_path / "out")] if command == "train" else []
        model = [str(tmp_path)] if command == "eval" else ["--model", str(tmp_path)]
        assert main([command, *model, "--task", task, "--data", str(tmp_path), *where]) == 2
        error = capsys.readouterr().err
        assert (
            f"task={task} needs {package}, which is not installed: pip install 'molf[sql]'."
            in error
        )
    assert not (tmp_path / "out").exists()


def test_model_is_needed(train):
    error = train(model=None)
    assert "--model" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output_dir", "~nobody-here/x", "--model", "/nowhere"],
        ["recipes", "cp", "demo-fact-molf", "~nobody-here/x.yaml"],
    ],
)
def test_home_of_an_unknown_user(refused, arguments):
    refused(*arguments)


def test_model_without_config(train, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    error = train(model=empty)
    assert str(empty) in error
    assert "config.json" in error


def test_model_path_that_does_not_exist(train):
    assert "./nowhere/at/all" in train(model="./nowhere/at/all")


def test_model_is_a_file(train, facts):
    assert "is a file" in train(model=facts)


def test_hub_cannot_be_reached(train):
    error = train(model="some-owner/some-model")
    assert "some-owner/some-model" in error
    assert "huggingface.co" in error
    assert (
        "Give the path of a local checkpoint: --model, or `model` in a recipe or a study." in error
    )


def test_forgetting_data(train):
    assert "nowhere.txt" in train("--forgetting_data", "nowhere.txt")


def test_output_dir_in_use(train, base):
    error = train(output_dir=base)
    assert str(base) in error
    assert "--overwrite" in error


def test_overwrite_spares_what_is_no_run(train, base):
    error = train("--overwrite", output_dir=base)
    assert "config.yaml" in error


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output_dir", LONG],
        ["train", "--model", LONG, "--task", "custom"],
        ["train", "--forgetting_data", LONG],
        ["train", "--data", LONG, "--task", "custom", "--model", "base"],
        ["train", "--config", LONG],
        ["eval", LONG, "--task", "demo-fact"],
        ["eval", "base", "--task", "demo-fact", "--output_dir", LONG],
        ["eval", "--task", "demo-fact", "--predictions", LONG],
        ["plan", "--model", LONG],
        ["routing", LONG],
        ["export", LONG],
        ["recipes", "cp", "demo-fact-molf", LONG],
    ],
)
def test_names_that_the_system_refuses(refused, base, arguments):
    assert "File name too long" in refused(*arguments)
    with_null = ["a\0b" if argument == LONG else argument for argument in arguments]
    error = refused(*with_null)
    assert "null byte" in error or "file not found" in error


def test_output_dir_below_a_file(train, facts):
    assert "is not a directory" in train(output_dir=facts / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place nobody can write to")
def test_output_dir_cannot_be_written(train):
    assert "cannot be written" in train(output_dir="/proc/molf-run")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loss_typ", "x", ["loss_typ", "SFTConfig", "loss_type"]),
        ("enable_jit_checkpoint", "true", ["enable_jit_checkpoint", "SIGTERM itself"]),
        ("optim_target_modules", "q_proj", ["optim_target_modules", "no effect"]),
        ("logging_nan_inf_filter", "true", ["logging_nan_inf_filter", "decides it itself"]),
        ("learning_rate", "1", ["--learning_rate"]),
        ("output_dir", "x", ["--output_dir"]),
        ("packing", "true", ["give --packing"]),
        ("packing_strategy", "wrapped", ["packing_strategy", "cuts no example"]),
        ("dataloader_num_workers", "many", ["dataloader_num_workers", "many"]),
        ("assistant_only_loss", "true", ["assistant_only_loss", "the task defines which tokens"]),
        ("eval_on_start", "true", ["eval_on_start", "before and after"]),
        ("use_liger_kernel", "true", ["use_liger_kernel", "not installed"]),
        ("fsdp", "full_shard", ["fsdp", "give --fsdp"]),
        ("deepspeed", "x.json", ["deepspeed", "give --fsdp"]),
        ("eos_token", "<nope>", ["eos_token", "tokenizer"]),
        ("chat_template_path", "x", ["chat_template_path", "tokenizer"]),
        ("lr_scheduler_kwargs", '{"a": 1}', ["lr_scheduler_kwargs={'a': 1}", "cosine", "'a'"]),
        ("bf16_full_eval", "true", ["bf16_full_eval", "no effect"]),
        ("ignore_data_skip", "true", ["ignore_data_skip", "where it stopped"]),
        ("hub_token", "hf_secret", ["hub_token", "pushes nothing", "molf push"]),
        ("hub_model_id", "me/model", ["hub_model_id", "pushes nothing"]),
    ],
)
def test_training_args(train, monkeypatch, name, value, words):
    if name == "use_liger_kernel":
        monkeypatch.setattr("molf.job.settings.training_arguments.find_spec", lambda name: None)
    error = train(f"--training_args.{name}", value)
    for word in words:
        assert word in error
    assert "hf_secret" not in error


def test_tracker_that_is_not_there(train):
    assert "report_to=nothing" in train("--report_to", "nothing")


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    from checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--target_modules", "q_proj,nothing"], ["'nothing'", "q_proj", "down_proj"]),
        (["--target_modules", "noth.*"], ["'noth.*'", "q_proj"]),
        (["--exclude_modules", ".*"], ["No layer is routed", "q_proj"]),
        (["--method", "lora", "--target_modules", "nothing"], ["'nothing'", "q_proj"]),
        (["--max_length", "3"], ["max_length=3"]),
    ],
)
def test_settings_that_do_not_fit_the_model(train, real_base, wrong, words):
    error = train(*wrong, "--ranks", "4", model=real_base)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("method", "rank", "words"),
    [
        ("pissa", 17, ["rank 17", "16 singular values", "--ranks"]),
        ("eva", 9, ["rank 9", "36 features", "--ranks"]),
    ],
)
def test_ranks_that_do_not_fit_the_layers(train, real_base, method, rank, words):
    error = train("--method", method, "--ranks", str(rank), model=real_base)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--ranks", "0"], ["ranks=[0]", "at least 1"]),
        (["--ranks", "4", "--top_k", "3"], ["top_k=3"]),
        (["--ranks", "4", "--target_modules", "nothing"], ["'nothing'", "q_proj"]),
    ],
)
def test_plans_that_do_not_fit_the_model(refused, real_base, wrong, words):
    error = refused("plan", "--model", str(real_base), *wrong)
    for word in words:
        assert word in error


def test_too_little_data_for_eva(train, real_base):
    """The two facts have some 12 tokens to complete."""
    error = train("--method", "eva", "--ranks", "8", model=real_base)
    assert "at least 32 completion tokens" in error


def test_plan_of_what_is_no_language_model(refused, tmp_path):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text('{"model_type": "vit"}')
    assert "vit" in refused("plan", "--model", "vision").lower()
    (tmp_path / "vision" / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "unheard-of" in refused("plan", "--model", "vision")


def test_model_without_weights(train, real_base, tmp_path):
    path = tmp_path / "weightless"
    path.mkdir()
    for file in real_base.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    assert str(path) in train("--ranks", "4", model=path)
    # Patterns are checked before weights are asked for, which may be a long download away.
    assert "'nothing'" in train("--ranks", "4", "--target_modules", "nothing", model=path)


def test_model_whose_weights_are_cut_off(train, real_base, tmp_path):
    path = tmp_path / "cut"
    path.mkdir()
    for file in real_base.iterdir():
        (path / file.name).write_bytes(file.read_bytes()[:5000])
    (path / "tokenizer.json").write_bytes((real_base / "tokenizer.json").read_bytes())
    assert str(path) in train("--ranks", "4", model=path)


def test_nothing_to_evaluate_within_the_limit(train, real_base, tmp_path, capsys, monkeypatch):
    """Found by the first evaluation, when the run has its directory: that goes again."""
    monkeypatch.chdir(tmp_path)
    for name, words in (("short", 3), ("long", 99)):
        record = {"prompt": "word " * words, "completion": " end"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    arguments = ["train", "--task", "custom", "--model", str(real_base), "--ranks", "4"]
    arguments += ["--data", "short.jsonl", "--eval_data", "long.jsonl", "--max_length", "32"]
    assert main([*arguments, "--output_dir", "run"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "max_length=32" in errors[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("not json\n", ["line 1", "not JSON"]),
        ('{"index": 0}\n', ["prediction"]),
        ('{"index": 7, "prediction": "x"}\n', ["7"]),
        ("", ["no predictions"]),
        ('{"index": 0, "prediction": "x", "n": ' + "9" * 5000 + "}\n", ["line 1", "not usable"]),
        ("[" * 100_000 + "\n", ["not usable JSON"]),
        ('{"index": 0, "prediction": "\\ud800"}\n', ["Prediction 0", "half a character"]),
        ("[1]\n", ["record 0", "not an object"]),
    ],
)
def test_predictions(refused, facts, tmp_path, lines, words):
    path = tmp_path / "predictions.jsonl"
    path.write_text(lines)
    error = refused("eval", "--task", "fact", "--data", str(facts), "--predictions", str(path))
    for word in words:
        assert word in error
