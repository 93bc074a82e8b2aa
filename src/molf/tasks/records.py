"""Records from wherever the user has them: a file, a folder, a URL or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from molf.errors import InputError
from molf.inputs import check_ordinary
from molf.paths import expanded
from molf.tasks.download import cached, download, is_url
from molf.tasks.files import (
    SUFFIXES,
    Record,
    check_fields,
    first_line,
    read_file,
    without_nulls,
)

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_MOST_ENTRIES = 100_000  # of a folder, whatever they are called
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_records(
    source: str | Path, fields: Collection[str] = (), *, option: str = "data"
) -> list[Record]:
    """All records of a source, whatever splits it has; see `read_splits`."""
    return [
        record
        for records in read_splits(source, fields, option=option).values()
        for record in records
    ]


def read_splits(
    source: str | Path, fields: Collection[str] = (), *, option: str = "data"
) -> dict[str, list[Record]]:
    """Read records by split.

    Args:
        source: A `.json`, `.jsonl`, `.parquet` or `.csv` file; a folder of such files, whose names
            may say train, test or validation; the URL of such a file; or a Hub id `owner/name`.
        fields: Fields that every record must have.
        option: The option that the source was given by, for messages.

    Returns:
        Records by split, in the order train, test, validation; those of no named split are
        `train`. Files of one split follow each other in the order of their names.

    Raises:
        InputError: The source does not exist, cannot be reached or read, or a record of it is
            wrong.
    """
    splits = _read(str(source), option)
    for split, records in splits.items():
        where = str(source) if len(splits) == 1 else f"{source} ({split})"
        check_fields(records, fields, where)
    return {split: splits[split] for split in ("train", "test", "validation") if split in splits}


def data_files(source: str) -> list[Path]:
    """The local files that a source is read from, in their order; none for a Hub id."""
    if is_url(source):
        copy = cached(source)
        return [copy] if copy.is_file() else []
    path = expanded(source)
    if os.path.isdir(path):
        return _files_in(path)
    return [path] if os.path.isfile(path) else []


def _read(source: str, option: str) -> dict[str, list[Record]]:
    if is_url(source):
        return {"train": read_file(download(source, option))}
    path = expanded(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise InputError(f"{option}: {source!r:.300} is not a path: {first_line(error)}") from error
    if is_folder:
        return _read_folder(path)
    if is_file:
        return {"train": read_file(path)}
    check_ordinary(path, f"{option}: {source}")
    if _looks_local(source):
        raise InputError(f"{option}: file not found: there is no file or folder {source}.")
    return _read_hub(source, option)


def _looks_local(source: str) -> bool:
    """Whether a missing source was meant as a path: anything but `owner/name`."""
    path = Path(source)
    return (
        not _HUB_ID.fullmatch(source)
        or path.suffix.lower() in (*SUFFIXES, ".tsv", ".txt", ".arrow", ".gz", ".zip")
        or path.parent.is_dir()  # owner/ exists here, so name was looked for in it
    )


def _read_folder(folder: Path) -> dict[str, list[Record]]:
    files = _files_in(folder)
    if not files:
        raise InputError(f"{folder} holds no data files ({', '.join(SUFFIXES)}).")
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if any(named.values()) and not all(named.values()):
        unnamed = next(path for path, split in named.items() if split is None)
        raise InputError(
            f"{folder}: some file names say train, test or validation, but {unnamed.name} does "
            "not. Give one file, or name all of them."
        )
    splits: dict[str, list[Record]] = {}
    for path, split in named.items():
        splits.setdefault(split or "train", []).extend(read_file(path))
    return splits


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder and of the folders in it, by path.

    Raises:
        InputError: A folder cannot be read, what is called as a data file is none, or there are so
            many files that another folder must be meant.
    """
    found: list[Path] = []
    seen = 0
    for place, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders.sort()
        seen += len(names) + len(folders)
        if seen > _MOST_ENTRIES:
            raise InputError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files. Give the folder of the data "
                "files alone."
            )
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                check_ordinary(path, str(path))
                found.append(path)
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _split_of(path: Path) -> str | None:
    """The split that a path's words name; the file's own name comes before its folders'."""
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _check_hub(name: str, option: str) -> None:
    """Ask the Hub once whether it is there; `datasets` would ask for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:  # the user wants what is cached
        return
    url = hf_hub_url(name, ".gitattributes", repo_type="dataset")
    try:
        get_hf_file_metadata(url)
    except HfHubHTTPError:
        return  # it is there; what is wrong with the data set is for `datasets` to say
    except Exception as error:  # of whichever HTTP library this version of the Hub client uses
        raise InputError(
            f"{option}: {name} is no local file or folder, and {url} cannot be reached: "
            f"{first_line(error)}. --{option} also takes a local file or folder; HF_HUB_OFFLINE=1 "
            "uses a cached copy."
        ) from error


def _read_hub(name: str, option: str) -> dict[str, list[Record]]:
    import datasets

    _check_hub(name, option)
    try:
        loaded = datasets.load_dataset(name)
        splits = {split: without_nulls(loaded[split].to_list()) for split in loaded}
    except Exception as error:  # whatever the libraries below raise: all mean "no data"
        raise InputError(
            f"{option}: {name} is no local file or folder, and the Hugging Face Hub gave no data "
            f"set of that name ({first_line(error)}). --{option} also takes a local file or folder."
        ) from error
    if len(splits) == 1:
        return {"train": next(iter(splits.values()))}
    known = {split: records for split, records in splits.items() if split in _SPLIT_WORDS.values()}
    if not known:
        raise InputError(
            f"{option}: {name} has the splits {', '.join(splits)}, none of which is train, test "
            "or validation. Save the one that is meant to a file."
        )
    return known
