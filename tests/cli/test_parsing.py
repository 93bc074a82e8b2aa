"""Signatures of commands are read once; what is given in one call is not there in the next."""

import pytest
from cyclopts import App, Parameter

from molf.cli.app import app
from molf.cli.parsing import QuickApp, read_once
from molf.cli.recipes.validation import _reader, parse_options
from molf.job.settings.settings import TrainSettings

# The method of cyclopts, which tests/conftest.py replaces.
_FRESH = App.assemble_argument_collection.__wrapped__


@pytest.fixture
def counted(monkeypatch):
    """How often a signature was read, and an App that reads it once."""
    read = []

    def assemble(self, **options):
        read.append(options["parse_docstring"])
        return _FRESH(self, **options)

    monkeypatch.setattr(QuickApp, "assemble_argument_collection", read_once(assemble))
    reader = QuickApp(default_parameter=app.default_parameter, result_action="return_value")
    return read, reader


def given(reader, *tokens):
    _, bound, _ = reader.parse_args(tokens, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def test_a_signature_is_read_once_and_no_value_stays(counted):
    from molf.cli.train import train_model

    read, reader = counted
    reader.command(train_model, name="train")
    options = ("--ranks", "4", "--training_args.neftune_noise_alpha", "5")
    first = given(reader, "train", *options)["settings"]
    assert (first.ranks, first.training_args) == ((4,), {"neftune_noise_alpha": "5"})
    second = given(reader, "train", "--method", "lora")["settings"]
    assert second == TrainSettings(method="lora")
    assert given(reader, "train") == {}
    assert given(reader, "train", *options)["settings"] == first
    assert read == [False]


def test_copies_are_the_arguments(counted):
    read, reader = counted
    reader.command(_command, name="try")
    one = reader["try"]
    first, again = (one.assemble_argument_collection() for _ in range(2))
    fresh = _FRESH(one)
    assert read == [False]
    for made in (first, again):
        # Converters are made anew when a signature is read.
        assert [_shown(x) for x in made] == [_shown(x) for x in fresh]
        parents = [x for x in made if x.children]
        assert all(any(child is one for one in made) for x in parents for child in x.children)
    assert not {id(x) for x in first} & {id(x) for x in again}


def _shown(argument):
    parameter = argument.parameter
    return argument.name, argument.hint, argument.keys, parameter.group, parameter.required


def _command(settings: TrainSettings | None = None, *, count: int = 1) -> None:
    """Do nothing."""


def test_another_signature_or_parameter_is_read_again(counted):
    read, reader = counted
    reader.default(_command)
    assert given(reader, "--count", "2") == {"count": 2}
    reader.assemble_argument_collection(parse_docstring=True)
    assert read == [False, True]
    given(reader)
    assert read == [False, True]
    renamed = reader.assemble_argument_collection(
        default_parameter=Parameter(name_transform=lambda name: name.upper())
    )
    assert read == [False, True, False]
    assert "--COUNT" in [argument.name for argument in renamed]


def test_recipes_and_studies_have_a_quick_reader(tmp_path):
    assert isinstance(_reader("train")["train"], QuickApp)
    for rank in (4, 8):
        settings = parse_options(tmp_path / "a.yaml", "train", {"ranks": rank})["settings"]
        assert settings == TrainSettings(ranks=(rank,))
