"""Run commands on odd recipes and count accepted, refused and faulty ones.

    python scripts/fuzz_recipes.py --count 20000 --seed 0

A command must accept a recipe, or refuse it with one line, within its time limit, and `molf recipes
validate` must agree. Everything else is a fault and is printed. Recipes are options of `molf train`
and `molf eval` with odd values; hostile YAML (alias bombs, other encodings, deep nesting, tags);
and mutated bytes of these. Nothing is trained or downloaded. Prints figures as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from molf.cli import main as molf
from molf.cli.eval_options import EvalOptions
from molf.cli.recipes.shipped import recipe_names, shipped_recipe
from molf.job import run
from molf.job.settings.settings import TrainSettings

if sys.platform != "win32":
    import resource

SECONDS = 2.0  # limit of CPU time for one recipe; most take a tenth of a second
LONGEST_LINE = 4000  # characters of a message
_OTHER_COMMAND = re.compile(rb"\s*#\s*molf\s+(?!(train|eval)\b)[\w-]")
_ACCEPTED, _REFUSED = 0, 2

_OPTIONS = {
    "train": [option.name for option in fields(TrainSettings)],
    "eval": [option.name for option in fields(EvalOptions)],
}
_ODD_NAMES = (
    "", "~", "null", "1", "1.5", "true", "seeed", "seed.x", "training_args.seed", "config", "run",
    "help", "--help", "--seed", "-h", "train", "plan", "version", "<<", "=", "[1]", "{a: 1}",
    "!!binary aGk=", "2026-01-01", "? a", "*", "settings", "options", "self", "\u00e9", "'a b'",
    "a" * 5000,
)  # fmt: skip
_SCALARS = (
    "", "~", "null", "''", "' '", "0", "-0", "1", "-1", "2", "3.0", "1.5", "1.10", "010", "0x10",
    "0b11", "0o7", "1_000", "1e3", "1e-5", "5.0e-05", "1e999", "-1e999", ".inf", "-.inf", ".nan",
    ".NaN", "nan", "inf", "1:30", "190:20:30", "true", "false", "yes", "no", "on", "off", "True",
    "9" * 18, "9" * 19, "9" * 400, "9" * 5000, "-" + "9" * 30, "0." + "1" * 400, "4294967296",
    "2026-01-01", "2026-01-01 12:00:00", "2026-13-45", "=", "<<", "abc", "'abc'", "a,b", ",", "4,8",
    "'4, 8'", "a" * 3000, "'[1, 2]'", "'{\"a\": 1}'", "molf", "fft", "lora", "molf-e", "sql", "med",
    "custom", "demo-sql", "all-linear", "'(('", "'.*'", "'\\'", '"\\ud800"', '"\\0"', '"\\e[31m"',
    '"\\U00110000"', '"\\UFFFFFFFF"', '"\\x"', "|\n  a\n  b", ">\n  a", "!!binary aGk=", "!!int x",
    "!!int ''", "!!float x", "!!bool x", "!!str 3", "!!null x", "!!timestamp x", "!foo 3", "!",
    "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "*nowhere", "&a 3", "/",
    "/dev/null", "~nobody-here/x", "\u00e9\u4e2d\U0001f600", "@", "`", "%", "- 1", "a: 1", "{", "]",
    "''''", '"', "'", "# comment", "\u2028", "\x07", "\x00", "\ufeff", "\ud7ff",
)  # fmt: skip
_LISTS = (
    "[]", "[~]", "['']", "[1, ~]", "[[1]]", "[[], []]", "[{}]", "[a, b]", "[4, 8]", "[4, x]",
    "[4, -8]", "[1.5]", "[q_proj, v_proj]", "{}", "{a: 1}", "{1: 2}", "{~: 1}", "{a: ~}", "{a: {}}",
    "{a: [1, [2, {b: c}]]}", "{a: 1, a: 2}", "{[1]: 2}", "!!set {1, 2}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "&a [*a]", "&a {a: *a}", "{lr_scheduler_kwargs: {num_cycles: .5}}",
    "{optim: x}", "{dataloader_num_workers: two}", "{neftune_noise_alpha: 5}", "{lr: .nan}",
    "{lr_scheduler_kwargs: {a: .inf}}", "{lr_scheduler_kwargs: {a: 2026-01-01}}", "[" + "1," * 3000
    + "1]", "{" + ", ".join(f"a{n}: {n}" for n in range(300)) + "}",
)  # fmt: skip


def _bomb(prefix: str, container: str) -> str:
    levels = [f"{prefix}a0: &a0 {container.format('x')}\n"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        levels.append(f"{prefix}a{level}: &a{level} [{inner}]\n")
    return "".join(levels)


_WHOLE = (
    "", " ", "\n", "---\n", "---\n...\n---\nseed: 1\n", "seed: 1\n---\nseed: 2\n", "- seed: 1\n",
    "3", "seed", "~", "[]", "{}", "{seed: 1}", '{"seed": 1, "ranks": [4, 8]}', "'",
    "%YAML 1.1\n---\nseed: 1\n", "%YAML 9.9\n---\nseed: 1\n",
    f"%YAML 1.{'9' * 5000}\n---\nseed: 1\n",
    "%TAG ! a\n---\nseed: 1\n", "seed:\t1\n", "\tseed: 1\n", "seed: 1\n  ranks: 4\n",
    "seed: 1\rranks: 4\r",
    "<<: {seed: 3}\n", "a: &a {seed: 3}\n<<: *a\n", "<<: [{seed: 3}, {seed: 4}]\n",
    "&a ? *a\n: 1\n",
    "seed: &s 3\nfew_shot: *s\n", "&a [*a]", "&a {seed: *a}", "? {a: 1}\n: 2\n", "? |\n  x\n: 2\n",
    "seed: " + "[" * 5000, "seed: " + "[" * 300 + "]" * 300, "{a: " * 2000, "- " * 3000,
    "training_args: " + "{a: " * 25 + "1" + "}" * 25, "? " * 3000, "!!map {seed: 1}\n",
    "!!set {seed}\n", "!!python/dict {seed: 1}\n", "seed: 1\n" * 500, "# molf eval x\nseed: 1\n",
    "# molf eval x\ntask: [sql, sql]\n", "# molf plan x\nseed: 1\n", "# molf --help\nseed: 1\n",
    "".join(f"option{n}: {n}\n" for n in range(150)),
    "".join(f"option{n}: {n}\n" for n in range(5000)), "# " + "x" * 70_000 + "\nseed: 1\n",
    "x" * 60_000, "training_args:\n" + "".join(f"  a{n}: {n}\n" for n in range(150)),
    "training_args:\n" + _bomb("  ", "[{0}, {0}]"), "training_args:\n" + _bomb("  ", "[[], []]"),
    _bomb("", "[{0}, {0}]"), "run: &a [*a]\nseed: 3\n", "run: !!binary x\nseed: 3\n", "run: ~\n",
)  # fmt: skip
_ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7", "cp500")


@dataclass
class Figures:
    """The result of a fuzzer run.

    Attributes:
        tried: Number of recipes.
        accepted: Recipes that a command accepted.
        refused: Recipes refused by exit code 2 and one line.
        faults: Number and outcome of each other recipe.
        seconds: Wall-clock time of all.
        slowest_seconds: CPU time of the slowest.
        peak_memory_mb: Largest resident memory of this process.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    peak_memory_mb: float = 0.0


def odd_recipes(count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` recipes, determined by the seed; the handwritten ones come first."""
    rng = random.Random(seed)
    shipped = [shipped_recipe(name).read_text(encoding="utf-8") for name in recipe_names()]
    whole = list(_WHOLE)
    rng.shuffle(whole)
    for number in range(count):
        if number < min(len(whole), count // 4):
            yield whole[number].encode("utf-8", "surrogatepass")
            continue
        kind = rng.random()
        text = _options(rng) if kind < 0.75 else rng.choice((rng.choice(shipped), _options(rng)))
        content = text.encode("utf-8", "surrogatepass")
        if 0.65 < kind < 0.7:
            content = text.encode(rng.choice(_ENCODINGS), "replace")
        elif kind > 0.75:
            content = _mutated(content, rng)
        yield content


def _options(rng: random.Random) -> str:
    """Return a few options, most of them known, each with an odd value."""
    command = rng.choice(("train", "train", "train", "eval"))
    lines = ["# molf eval MODEL"] if command == "eval" else []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name = rng.choice(_ODD_NAMES if rng.random() < 0.1 else _OPTIONS[command])
        value = rng.choice(_LISTS if rng.random() < 0.25 else _SCALARS)
        if rng.random() < 0.1:
            name, value = "training_args", rng.choice(_LISTS)
        lines.append(f"{name}: {value}")
    return "\n".join(lines) + "\n"


def _mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0:
                content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
            case 1:
                content = (
                    content[:place]
                    + rng.choice(b":-[]{}&*!|>'\"%@`,#?\t\n \\\0").to_bytes(1, "big")
                    + content[place:]
                )
            case 2:
                content = content[:place]
            case 3:
                end = place + rng.randrange(30)
                content = content[:place] + content[place:end] * 2 + content[end:]
            case 4:
                content = content[:place] + content[place + rng.randrange(20) :]
    return content


def fuzz(recipes: Iterator[bytes]) -> Figures:
    """Run each recipe's command without its work, and `molf recipes validate`."""
    import molf.cli.evaluation
    import molf.cli.plan_report
    import molf.cli.summary
    import molf.job.trainer.sft_config  # noqa: F401 (an import of seconds, not part of a recipe's time)

    figures = Figures()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _without_work():
        path = Path(folder) / "recipe.yaml"
        for content in recipes:
            path.write_bytes(content)
            begin = time.process_time()
            outcome = _outcome(_command(content, path), most_errors=1)
            seconds = time.process_time() - begin
            validated = outcome
            if not _OTHER_COMMAND.match(content):  # other commands have no recipes
                validated = _outcome(["recipes", "validate", str(path)], most_errors=1000)
            # Validation accepts recipes without options that the command line must then give.
            if validated != outcome and (outcome, validated) != ("refused", "accepted"):
                outcome = f"{outcome}, but validated: {validated}"
            figures.slowest_seconds = max(figures.slowest_seconds, seconds)
            if seconds > SECONDS:
                outcome = f"took {seconds:.1f} s"
            if outcome not in ("accepted", "refused"):
                shown = content if len(content) < 200 else content[:200] + b"..."
                figures.faults.append(f"{figures.tried}: {outcome}: {shown!r}")
            figures.accepted += outcome == "accepted"
            figures.refused += outcome == "refused"
            figures.tried += 1
        if [name.name for name in Path(folder).iterdir()] != ["recipe.yaml"]:
            figures.faults.append("files appeared beside the recipe")
    figures.seconds = time.monotonic() - start
    if sys.platform != "win32":
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, else KiB
        figures.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return figures


@contextlib.contextmanager
def _without_work() -> Iterator[None]:
    """Stop `molf train` after the check of its options, and `molf eval` after reading them."""

    def train(settings: TrainSettings) -> SimpleNamespace:
        directory = run.checked(settings, datetime.now()).output_dir
        return SimpleNamespace(directory=directory, training_seconds=0.0)

    patches = {
        "molf.job.run.train": train,
        "molf.job.extract.spectra.spectra_at_end": lambda directory, seconds: None,
        "molf.report.build.page_at_end": lambda directory: None,
        "molf.job.run.dry_run": lambda settings: run.checked(settings, datetime.now()),
        "molf.cli.evaluation.evaluate_checkpoint": lambda model, options: {},
        "molf.cli.evaluation.score_saved_texts": lambda options: {},
        "molf.cli.summary.print_summary": lambda result, page: None,
        "molf.cli.summary.print_evaluations": lambda evaluations: None,
        "molf.cli.plan_report.print_dry_run": lambda result: None,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(patch(name, replacement))
        yield


def _command(content: bytes, path: Path) -> list[str]:
    """Return the arguments of the command named in the recipe's first line."""
    if content.startswith(b"# molf eval"):
        return ["eval", "MODEL", "--config", str(path)]
    return ["train", "--config", str(path)]


def _outcome(arguments: list[str], most_errors: int) -> str:
    """Run a command; return "accepted", "refused", or a description of any other outcome."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = molf(arguments)
        except BaseException as error:
            return f"raised {type(error).__name__}: {error}"
    lines = errors.getvalue().splitlines()
    kinds = Counter(line[: len("molf: error: ")] for line in lines)
    if any(len(line) > LONGEST_LINE for line in lines):
        return f"a line of {max(map(len, lines))} characters"
    if not all(line.startswith(("molf: error: ", "molf: warning: ")) for line in lines):
        return f"printed {lines}"
    if code == _ACCEPTED:
        return "accepted" if not kinds["molf: error: "] else f"accepted with {lines}"
    if code == _REFUSED:
        found = kinds["molf: error: "]
        return "refused" if 1 <= found <= most_errors else f"refused with {found} errors: {lines}"
    return f"exit code {code}: {lines}"


def main() -> None:
    """Fuzz and print the figures; exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="recipes to try")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = fuzz(odd_recipes(arguments.count, arguments.seed))
    print(json.dumps(asdict(figures), ensure_ascii=True, indent=1))
    if figures.faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
