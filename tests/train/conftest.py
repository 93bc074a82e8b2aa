import sys
from pathlib import Path

import pytest
import torch

from molf.cli import main

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluate"))  # for tiny_models


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def facts(workplace):
    from checkpoints import write_facts

    return write_facts(workplace / "facts.jsonl")


@pytest.fixture(scope="session")
def base(workplace):
    from checkpoints import write_checkpoint

    return write_checkpoint(workplace / "base")


@pytest.fixture(scope="session")
def options(base, facts):
    """A training of three steps; what a test gives after these must not repeat one of them."""
    return [
        *("train", "--task", "fact", "--model", str(base), "--data", str(facts)),
        *("--ranks", "4", "--alpha", "4", "--logging_steps", "1"),
        *("--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
        *("--gradient_accumulation_steps", "1", "--max_steps", "3"),
    ]


@pytest.fixture(scope="session")
def record():
    """Run a training in this process, recording the trained model and the optimizer's decisions."""
    from recorded import Recorded, logits_of

    from molf.core.optimizer import MoLFAdamW
    from molf.train import job, training

    def run(arguments, path):
        recorded = Recorded(path, arguments)
        save, finished, step = job.save_model, training.finished, MoLFAdamW.step

        def saving(model, base, dtype, card, path):
            recorded.trained_logits = logits_of(model)
            save(model, base, dtype, card, path)

        def finishing(model):
            recorded.adapter_logits = logits_of(model)
            return finished(model)

        def stepping(self, closure=None):
            loss = step(self, closure)
            recorded.routing.append(dict(self.routing))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "save_model", saving)
            patch.setattr(training, "finished", finishing)
            patch.setattr(MoLFAdamW, "step", stepping)
            assert main([*arguments, "--output_dir", str(path)]) == 0
        return recorded

    return run


@pytest.fixture(scope="session")
def molf_run(record, options, workplace):
    return record([*options, "--method", "molf"], workplace / "molf")


@pytest.fixture(scope="session")
def lora_run(record, options, workplace):
    return record([*options, "--method", "lora"], workplace / "lora")


@pytest.fixture(scope="session")
def fft_run(record, options, workplace):
    return record([*options, "--method", "fft"], workplace / "fft")


@pytest.fixture(params=["fft", "lora", "molf"])
def any_run(request):
    return request.getfixturevalue(f"{request.param}_run")
