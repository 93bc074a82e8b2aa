import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_recipes.py"


@pytest.fixture(scope="module")
def fuzz_recipes():
    spec = importlib.util.spec_from_file_location("fuzz_recipes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fuzz_recipes", module)  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module


def test_recipes_are_a_function_of_the_seed(fuzz_recipes):
    first = list(fuzz_recipes.odd_recipes(200, seed=3))
    assert first == list(fuzz_recipes.odd_recipes(200, seed=3))
    assert first != list(fuzz_recipes.odd_recipes(200, seed=4))
    assert len(set(first)) > 150


@pytest.mark.slow
def test_every_recipe_is_accepted_or_refused_by_a_line(fuzz_recipes):
    figures = fuzz_recipes.fuzz(fuzz_recipes.odd_recipes(200, seed=0))
    assert figures.faults == []
    assert figures.accepted + figures.refused == figures.tried == 200
    assert figures.accepted > 20  # otherwise the recipes would be too odd to get anywhere
