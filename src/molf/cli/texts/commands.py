"""`molf generate` and `molf chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from molf.cli.texts.options import TextOptions
from molf.data.files import data_suffix, read_file
from molf.errors import InputError
from molf.inputs import read_text
from molf.paths import expanded
from molf.shown import as_line, json_text, printable

if TYPE_CHECKING:
    from molf.cli.texts.writer import Writer

_MOST_BYTES = 2**30
_END, _CLEAR = ("/exit", "/quit"), "/clear"


def generate_text(
    model: str,
    /,
    *texts: str,
    options: TextOptions = TextOptions(),  # noqa: B008 (frozen)
    prompts: Path | None = None,
    chat: bool | None = None,
    system: str | None = None,
    jsonl: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Print a model's answers to prompts.

    Args:
        model: A run, a local directory in transformers format, or a Hub id.
        texts: Prompts.
        options: How answers are generated.
        prompts: Further prompts: a text file of one per line, or a data file of {"prompt": text} or
            {"messages": [...]}, such as JSONL.
        chat: Render each prompt as a user's message by the chat template; --no-chat: continue the
            text as it stands. Default: by the template, if there is one.
        system: The system's message of a chat.
        jsonl: Print {"prompt": ..., "answer": ...} per line.
    """
    given: list[str | list[dict[str, Any]]] = list(texts)
    if prompts is not None:
        given += _read_prompts(prompts)
    if not given:
        raise InputError("Give a prompt, several, or a file by --prompts; given: none.")
    writer = _writer(model, options)
    as_chat = writer.has_template if chat is None else chat
    if system is not None and not as_chat:
        raise InputError("system needs a chat, and these prompts are continued as plain text.")
    for prompt in given:
        if isinstance(prompt, list):
            ids = writer.ids_of_chat(prompt)
        elif as_chat:
            ids = writer.ids_of_chat([*_system(system), {"role": "user", "content": prompt}])
        else:
            ids = writer.ids_of_text(prompt)
        if jsonl:
            sys.stdout.write(json_text({"prompt": prompt, "answer": writer.answer(ids)}) + "\n")
            continue
        if len(given) > 1:
            shown = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
            sys.stdout.write(f"> {as_line(shown)}\n")
        writer.answer(ids, _show)
        sys.stdout.write("\n" if len(given) == 1 else "\n\n")
        sys.stdout.flush()


def chat_with(
    model: str,
    /,
    *,
    options: TextOptions = TextOptions(),  # noqa: B008 (frozen)
    system: str | None = None,
) -> None:
    """Talk to a model. /clear begins anew, /exit or the end of the input ends it.

    Args:
        model: A run, a local directory in transformers format, or a Hub id.
        options: How answers are generated.
        system: The system's message.
    """
    writer = _writer(model, options)
    if not writer.has_template:
        raise InputError(
            f"model {model} has no chat template. molf generate {model} continues a text."
        )
    history = _system(system)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text in _END:
            break
        if text == _CLEAR:
            history = _system(system)
            continue
        if not text:
            continue
        try:
            asked = [*history, {"role": "user", "content": text}]
            answer = writer.answer(writer.ids_of_chat(asked), _show)
        except InputError as error:  # the conversation has become too long
            sys.stdout.write(f"{error} {_CLEAR} begins anew.\n")
            continue
        sys.stdout.write("\n")
        sys.stdout.flush()
        history = [*asked, {"role": "assistant", "content": answer}]


def _writer(model: str, options: TextOptions) -> Writer:
    from molf.job.model.path import check_model
    from molf.job.record.finished_run import read_run
    from molf.job.record.ownership import MODEL, is_run

    path = expanded(model)
    if is_run(path):
        read_run(path).check(MODEL)
        model = str(path / MODEL)
    check_model(model)
    from molf.job.libraries import quiet_libraries
    from molf.job.progress import make_reporter

    with quiet_libraries(), make_reporter().working(f"Loading {model}"):
        from molf.cli.texts.writer import Writer

        return Writer(model, options)


def _show(piece: str) -> None:
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


def _system(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _read_line() -> str | None:
    """Return a line of standard input; None at its end."""
    if sys.stdin.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    line = sys.stdin.readline()
    return line or None


def _read_prompts(path: Path) -> list[str | list[dict[str, Any]]]:
    """Return the prompts of a file.

    Raises:
        InputError: It cannot be read, or a record has no prompt.
    """
    path = expanded(path)
    if data_suffix(path) is None:
        # splitlines() would also split at characters inside of a line.
        lines = read_text(path, f"prompts {path}", most=_MOST_BYTES).split("\n")
        return [line.rstrip("\r") for line in lines if line.strip()]
    found: list[str | list[dict[str, Any]]] = []
    for number, record in enumerate(read_file(path, f"prompts {path}")):
        prompt = record.get("prompt", record.get("messages"))
        is_chat = isinstance(prompt, list) and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) for one in prompt
        )
        if not (isinstance(prompt, str) or (is_chat and prompt)):
            raise InputError(
                f'prompts {path}: record {number} has neither "prompt", a text, nor "messages", a '
                "list of messages."
            )
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]  # a record to train on: its answer is generated anew
        found.append(prompt)
    return found
