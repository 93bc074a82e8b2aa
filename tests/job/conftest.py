import pytest
import torch

from molf.cli import main
from molf.job.settings.defaults import METHODS

torch.set_num_threads(1)


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
def assignment(workplace):
    """An assignment for the tiny checkpoints: layers of every kind, adapters of two ranks."""
    path = workplace / "assignment.yaml"
    path.write_text(
        "full: [k_proj, v_proj]\n"
        "lora:\n"
        "  - {r: 4, alpha: 8, modules: [q_proj, o_proj]}\n"
        "  - {r: 2, alpha: 4, modules: [mlp]}\n"
        "frozen: [0.mlp.up_proj]\n"
    )
    return path


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
    """Run a training in this process, recording what was trained and the optimizer's decisions."""
    from molf.core.model.quantised import is_quantised
    from molf.core.optimizer import MoLFAdamW
    from molf.job import trained_model, training
    from recorded import Recorded, logits_of, parameters_of

    def run(arguments, path):
        recorded = Recorded(path, arguments)
        save, prepare, step = trained_model.save_model, training.prepare, MoLFAdamW.step
        merge = training.merge_trained

        def saving(model, *given, **options):
            recorded.trained_logits = logits_of(model)
            return save(model, *given, **options)

        def preparing(model, *given):
            recorded.base_logits = logits_of(model)
            prepared = prepare(model, *given)
            recorded.prepared = prepared
            recorded.start = parameters_of(prepared.model)
            recorded.start_logits = logits_of(prepared.model)
            return prepared

        def merging(model, *given):
            recorded.end = parameters_of(model)
            # Exact bfloat16 weights are float32 by now, and frozen ones beside them are not.
            own = [p for n, p in model.named_parameters() if ".lora_" not in n]
            if len({p.dtype for p in own if not is_quantised(p)}) == 1:
                recorded.adapter_logits = logits_of(model)
            return merge(model, *given)

        def stepping(self, closure=None):
            loss = step(self, closure)
            recorded.routing.append(dict(self.routing))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trained_model, "save_model", saving)
            patch.setattr(training, "prepare", preparing)
            patch.setattr(training, "merge_trained", merging)
            patch.setattr(MoLFAdamW, "step", stepping)
            assert main([*arguments, "--output_dir", str(path)]) == 0
        return recorded

    return run


@pytest.fixture(scope="session")
def run_of(record, options, workplace, assignment):
    """The run of a method, in a directory of its name; each is made once.

    `molf-dropout` is molf in its explicit form.
    """
    runs = {}
    further = {
        "lora+": ["--loraplus_lr_ratio", "2"],  # 16 times the rate of the others is too much
        "molf-dropout": ["--method", "molf", "--lora_dropout", "0.05"],
        "hybrid": ["--assignment", str(assignment)],
    }

    def run(name):
        if name not in runs:
            arguments = [*options]
            if name == "molf-e":
                arguments[arguments.index("--ranks") + 1] = "2,4"
            if name != "molf-dropout":
                arguments += ["--method", name]
            runs[name] = record([*arguments, *further.get(name, [])], workplace / name)
        return runs[name]

    return run


@pytest.fixture
def molf_run(run_of):
    return run_of("molf")


@pytest.fixture
def lora_run(run_of):
    return run_of("lora")


@pytest.fixture(params=[*METHODS, "molf-dropout"])
def any_run(request, run_of):
    return run_of(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, 12 requests to train it on, and a plain text."""
    from checkpoints import write_checkpoint, write_facts

    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "base")
    write_facts(folder / "facts.jsonl")
    (folder / "plain.txt").write_text("Anna walks to the river and sits down by the water. " * 10)
    return folder


@pytest.fixture(scope="module")
def launch(folder):
    """Starts `molf` in several processes."""
    from launched import Launcher

    return Launcher(folder)


@pytest.fixture(scope="module")
def command(folder):
    """Arguments of a training on the folder's requests."""
    from near_runs import facts_command

    return facts_command(folder)


@pytest.fixture(scope="module")
def one(launch, command, folder):
    """A run of one process, with steps of 10 examples."""
    path = folder / "one"
    launch.to_the_end(command(path, 5, 2), 1)
    return path
