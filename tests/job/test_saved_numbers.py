"""Saving keeps the types that the base has, says what it kept of a training, and can keep all."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from checkpoints import write_checkpoint
from molf.cli import main
from molf.job.model.card import show_saved
from molf.job.model.low_halves import Rounding
from molf.job.model.saved_update import SavedUpdate
from slow_cases import slow_after
from tiny_models import byte_level_tokenizer

WEIGHTS = "model.safetensors"


def change(path, change):
    """Write a checkpoint's tensors again, as `change(name, tensor)` gives them."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path


def dtypes(path):
    return {name: tensor.dtype for name, tensor in load_file(path / WEIGHTS).items()}


def float32_norms(name, tensor):
    return tensor.float() + 1e-4 if "norm" in name or name.endswith("A_log") else tensor


@pytest.fixture(scope="module")
def half_base(workplace):
    return write_checkpoint(workplace / "saved-half", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def mixed_base(workplace):
    base = write_checkpoint(workplace / "saved-mixed", dtype=torch.bfloat16)
    return change(base, float32_norms)


@pytest.fixture
def train(facts, tmp_path):
    """Run a short training with small steps; return its directory."""

    def run(base, *options, name="run", code=0):
        path = tmp_path / name
        arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
        arguments += ["--ranks", "4", "--max_steps", "2", "--warmup_ratio", "0"]
        arguments += ["--learning_rate", "2e-5", "--lora_learning_rate", "1e-3"]
        assert main([*arguments, "--output_dir", str(path), *options]) == code
        return path

    return run


@pytest.mark.parametrize("method", ["fft", "molf", "molf-e"])
def test_each_tensor_keeps_the_type_that_the_base_has_it_in(train, mixed_base, method):
    run = train(mixed_base, "--method", method)
    assert dtypes(run / "model") == dtypes(mixed_base)
    assert json.loads((run / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert yaml.safe_load((run / "config.yaml").read_text())["save_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_save_dtype_is_that_of_the_main_tensors(train, mixed_base, dtype):
    run = train(mixed_base, "--save_dtype", dtype)
    expected = {torch.bfloat16: getattr(torch, dtype), torch.float32: torch.float32}
    assert dtypes(run / "model") == {n: expected[d] for n, d in dtypes(mixed_base).items()}


def test_export_keeps_what_is_not_of_the_main_type(train, mixed_base, tmp_path):
    run = train(mixed_base, "--method", "lora")
    out = tmp_path / "exported"
    assert main(["export", str(run), "--dtype", "float16", "--output_dir", str(out)]) == 0
    expected = {torch.bfloat16: torch.float16, torch.float32: torch.float32}
    assert dtypes(out) == {n: expected[d] for n, d in dtypes(mixed_base).items()}


def test_states_of_mamba_stay_float32(train, tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=512,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        expand=2,
        time_step_rank=4,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    base = tmp_path / "mamba"
    MambaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    byte_level_tokenizer().save_pretrained(base)
    change(base, float32_norms)
    run = train(base, "--method", "fft")
    found = dtypes(run / "model")
    assert found == dtypes(base)
    assert found["backbone.layers.0.mixer.A_log"] == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_not_trained_is_stored_as_it_was(train, mixed_base, dtype):
    run = train(mixed_base, "--method", "lora", "--dtype", dtype)
    before, after = load_file(mixed_base / WEIGHTS), load_file(run / "model" / WEIGHTS)
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {name for name in before if "_proj.weight" not in name}


def test_numbers_and_codes_that_are_not_floating_keep_their_types(train, half_base, monkeypatch):
    """Buffers of integers and truth values, and one of float64, which no model here has."""
    from molf.job.model.loading import load_model
    from molf.job.model.saved_tensors import Storing, take_tensors
    from molf.job.model.stored import StoredCheckpoint, StoredTensor

    loaded = load_model(str(half_base))
    stored = dict(loaded.stored.tensors)
    for name, tensor in (
        ("counts", torch.arange(3)),
        ("mask", torch.tensor([True, False])),
        ("bits", torch.tensor([1, 0], dtype=torch.uint8)),
        ("exact", torch.tensor([0.1, -torch.inf], dtype=torch.float64)),
    ):
        loaded.model.register_buffer(name, tensor)
        stored[name] = StoredTensor(name, half_base, tensor.dtype, tuple(tensor.shape))
    vars(loaded.stored)["tensors"] = stored
    monkeypatch.setattr(
        StoredCheckpoint, "read", lambda self, name: torch.tensor([0.1, -torch.inf]).double()
    )
    found = take_tensors(loaded.model, loaded, Storing(torch.float16)).tensors
    kept = [found[name].dtype for name in ("counts", "mask", "bits", "exact")]
    assert kept == [torch.int64, torch.bool, torch.uint8, torch.float64]
    assert found["model.norm.weight"].dtype == torch.float16


def compare(base, trained, saved):
    """Moved and kept shares, error and length of the saved update, from files alone."""
    start, end, stored = (load_file(path / WEIGHTS) for path in (base, trained, saved))
    moved = kept = count = 0
    update = error = along = 0.0
    for name, before in start.items():
        u, v = end[name] - before.float(), stored[name].float() - before.float()
        count += u.numel()
        moved += int((u != 0).sum())
        kept += int((v != 0).sum())
        update += float(u.double().square().sum())
        error += float((u - v).double().square().sum())
        along += float((u.double() * v.double()).sum())
    return moved / count, kept / count, (error / update) ** 0.5, along / update


@pytest.mark.parametrize(
    ("method", "rounding", "dtype"),
    slow_after(
        2,
        [
            ("molf", "stochastic", "bfloat16"),
            ("fft", "nearest", "float32"),
            ("molf", None, "float32"),
            ("lora", "nearest", "float32"),
            ("molf-e", None, "bfloat16"),
        ],
    ),
)
def test_share_that_the_save_kept_is_reported(train, half_base, capsys, method, rounding, dtype):
    options = ["--method", method, "--dtype", dtype]
    given = ["--save_rounding", rounding] if rounding else []
    saved = train(half_base, *options, *given)
    printed = capsys.readouterr().out
    whole = train(half_base, *options, "--save_dtype", "float32", name="whole")
    moved, kept, error, along = compare(half_base, whole / "model", saved / "model")
    record = yaml.safe_load((saved / "config.yaml").read_text())["run"]["saved"]
    assert record["dtype"] == "bfloat16"
    assert record["rounding"] == (rounding or "stochastic")  # on a base of that type
    assert record["moved_share"] == pytest.approx(moved)
    assert record["kept_share"] == pytest.approx(kept)
    assert record["update_error"] == pytest.approx(error, rel=1e-4)
    assert record["update_kept"] == pytest.approx(along, rel=1e-4)
    assert 0 < kept < moved
    assert error > 0.005
    shown = f"{moved:.1%} of all numbers moved, {kept:.1%} differ from the base after saving"
    assert shown in printed
    assert shown in (saved / "model" / "README.md").read_text()
    record = yaml.safe_load((whole / "config.yaml").read_text())["run"]["saved"]
    assert (record["kept_share"], record["update_error"]) == (pytest.approx(moved), 0)


def test_nearest_is_the_default_where_the_base_is_between_the_numbers(train, base):
    run = train(base, "--save_dtype", "bfloat16")
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["run"]["saved"]["rounding"] == "nearest"
    assert record["save_rounding"] is None


@pytest.mark.parametrize(
    ("method", "dtype", "rounding"),
    slow_after(
        1,
        [
            ("molf", "bfloat16", "stochastic"),
            ("fft", "float32", "nearest"),
            ("molf-dropout", "bfloat16", "nearest"),
            ("lora", "float32", "stochastic"),
        ],
    ),
)
def test_kept_low_halves_give_the_float32_model(train, half_base, method, dtype, rounding, capsys):
    options = ["--dtype", dtype, "--save_rounding", rounding, "--seed", "7"]
    options += (
        ["--lora_dropout", "0.1"] if method == "molf-dropout" else ["--method", method]
    )  # an adapter beside trained weights
    run = train(half_base, *options, "--keep_low_halves")
    printed = capsys.readouterr().out
    assert str(run / "low_halves.safetensors") in printed
    whole = train(half_base, *options, "--save_dtype", "float32", name="whole")
    assert not (whole / "low_halves.safetensors").exists()
    assert set(dtypes(run / "model").values()) == {torch.bfloat16}
    assert main(["export", str(run), "--dtype", "float32"]) == 0
    assert "nothing more exact" not in capsys.readouterr().err
    exported = load_file(run / "model-float32" / WEIGHTS)
    expected = load_file(whole / "model" / WEIGHTS)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    record = yaml.safe_load((run / "config.yaml").read_text())["run"]["saved"]
    halves = load_file(run / "low_halves.safetensors")
    assert record["low_halves_bytes"] == sum(2 * half.numel() for half in halves.values())


def test_a_run_with_low_halves_can_be_replaced(train, half_base):
    train(half_base, "--keep_low_halves")
    run = train(half_base, "--overwrite")
    assert not (run / "low_halves.safetensors").exists()


def test_export_of_a_broken_file_of_halves_is_one_line(train, half_base, capsys):
    run = train(half_base, "--keep_low_halves")
    (run / "low_halves.safetensors").write_bytes(b"half")
    assert main(["export", str(run), "--dtype", "float32"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "low_halves.safetensors cannot be read" in error
    assert not (run / "model-float32").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save_dtype", "float32"], "keep_low_halves with save_dtype=float32"),
        (["--dtype", "bfloat16", "--weight_rounding", "nearest"], "weight_rounding=nearest"),
        ([], "is saved in float32, and only bfloat16 has low halves"),
        (["--save_rounding", "up"], "nearest"),
    ],
)
def test_halves_that_cannot_be_kept_are_refused(train, base, capsys, options, message):
    run = train(base, "--keep_low_halves", *options, code=2)
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_draws_belong_to_seed_and_tensor():
    values = torch.full((2000,), 1.001)
    first = Rounding("stochastic", 1).split(values, "a")[0]
    assert torch.equal(first, Rounding("stochastic", 1).split(values, "a")[0])
    assert not torch.equal(first, Rounding("stochastic", 2).split(values, "a")[0])
    assert not torch.equal(first, Rounding("stochastic", 1).split(values, "b")[0])
    parts = [
        Rounding("stochastic", 1).split(values[i : i + 500], "a", i)[0] for i in range(0, 2000, 500)
    ]
    assert torch.equal(first, torch.cat(parts))


def test_an_export_to_bfloat16_rounds_as_the_run_would(train, half_base, tmp_path):
    run = train(half_base, "--save_dtype", "float32", "--seed", "3")
    direct = train(half_base, "--seed", "3", name="direct")
    for rounding, given in (("stochastic", []), ("nearest", ["--save_rounding", "nearest"])):
        out = tmp_path / rounding
        arguments = ["export", str(run), "--dtype", "bfloat16", "--output_dir", str(out)]
        assert main([*arguments, *given]) == 0
        same = [
            torch.equal(tensor, load_file(out / WEIGHTS)[name])
            for name, tensor in load_file(direct / "model" / WEIGHTS).items()
        ]
        assert all(same) == (rounding == "stochastic")


def test_a_rounding_without_effect_is_reported(train, base, tmp_path, capsys):
    run = train(base, "--save_rounding", "stochastic")
    warning = "molf: warning: Without effect: save_rounding="
    assert f"{warning}stochastic. The model is saved in float32." in capsys.readouterr().err
    arguments = ["export", str(run), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "bfloat16", "--save_rounding", "nearest"]) == 0
    assert warning not in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--save_rounding", "nearest"]) == 0
    assert f"{warning}nearest. The model is stored in torch.float32" in capsys.readouterr().err


def test_a_file_in_shards_is_read_through_its_index(half_base, tmp_path):
    from molf.job.model.stored import StoredCheckpoint

    model = AutoModelForCausalLM.from_pretrained(half_base, dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists()
    found, expected = StoredCheckpoint(str(tmp_path)), load_file(half_base / WEIGHTS)
    assert found.tensors.keys() == expected.keys()
    assert found.main_dtype == torch.bfloat16
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
    assert found.find("layers.0.mlp.up_proj.weight", "model") == "model.layers.0.mlp.up_proj.weight"
    assert found.find("nothing", "model") is None


def test_update_of_nothing_has_no_error():
    update = SavedUpdate()
    update.add(torch.ones(2), torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    record = update.record()
    assert (record["moved_share"], record["kept_share"], record["update_error"]) == (0, 0, 0)
    shown = show_saved(record | {"dtype": "float32", "rounding": "stochastic"})
    assert shown == "float32: no number moved in the training"
