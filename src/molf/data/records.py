"""Reading of records from a file, a folder, a URL or the Hugging Face Hub."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.data.compressed import COMPRESSIONS
from molf.data.download import cached, download, is_url
from molf.data.files import (
    SUFFIXES,
    Record,
    check_fields,
    data_suffix,
    records_in,
    rows_of,
)
from molf.data.sources import Source, sources_of
from molf.data.stdin import SHOWN, STDIN, stdin_copy
from molf.errors import InputError, reason_of
from molf.inputs import check_ordinary
from molf.paths import expanded

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
_ROWS = 1000  # of a data set that are objects at once
_MOST_ENTRIES = 100_000  # files in a folder, data files or not
# owner/name, owner/name:configuration, owner/name:configuration:split, owner/name::split
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+|:[\w.-]*:[\w.-]+)?")
_BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`
_CACHED = "cache-"  # results of `map` and `filter`, which `datasets` writes beside its data
_ORDER = ("train", "test", "validation")
# The error of `datasets` for a data set with several configurations and no default.
_MISSING_CONFIGURATION = re.compile(r"available configs: \[(.*?)\]")


class _FileRecords(Iterable[Record]):
    """The records of a file.

    Args:
        path: The file.
        shown: Its name in messages; the path if not given.
    """

    def __init__(self, path: Path, shown: str | None = None) -> None:
        self._path = path
        self._shown = shown

    def __iter__(self) -> Iterator[Record]:
        return records_in(self._path, self._shown)


class _RowRecords(Iterable[Record]):
    """The records of a data set of `datasets`."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows.with_format("arrow")

    def __iter__(self) -> Iterator[Record]:
        for table in self._rows.iter(_ROWS):
            yield from rows_of(table)


@dataclass(frozen=True)
class Part:
    """Records of one file, or of one split of a Hub data set.

    Attributes:
        place: The file, or the data set and split, for messages.
        records: The records, which are read from the file in each iteration.
        weight: The weight of the source (`molf.data.sources.Source`).
    """

    place: str
    records: Iterable[Record]
    weight: float = 1.0


class _Joined(Iterable[Record]):
    """The records of several parts."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(part.records for part in self._parts)


def read_records(
    source: str | Path, fields: Collection[str] = (), *, option: str = "data"
) -> list[Record]:
    """Read the records of all splits of a source; see `read_splits`."""
    return list(itertools.chain(*read_splits(source, fields, option=option).values()))


def read_splits(
    source: str | Path, fields: Collection[str] = (), *, option: str = "data"
) -> dict[str, list[Record]]:
    """Read records by split.

    Args:
        source: A file whose name ends with one of `SUFFIXES`; a folder of such files, whose names
            may contain train, test or validation; the URL of such a file; a Hub id `owner/name`
            or `owner/name:configuration`; `-` for standard input; several of these, separated by
            commas.
        fields: Fields that every record must have.
        option: The option that the source was given by, for messages.

    Returns:
        Records by split, in the order train, test, validation; a file without a split in its name
        is `train`. Files of one split are read in the order of their names.

    Raises:
        InputError: The source does not exist, cannot be reached or read, has an invalid record, or
            a weight.
    """
    splits = {name: list(part) for name, part in split_records(source, option=option).items()}
    for split, records in splits.items():
        where = str(source) if len(splits) == 1 else f"{source} ({split})"
        for index, record in enumerate(records):
            check_fields(record, fields, f"{where}, record {index}")
    return splits


def split_records(source: str | Path, *, option: str = "data") -> dict[str, Iterable[Record]]:
    """Find records by split, which are read in each iteration over them.

    The arguments, order and errors are those of `read_splits`; an invalid record raises where it is
    read.
    """
    splits: dict[str, Iterable[Record]] = {}
    for split, parts in read_parts(source, option=option).items():
        if weighted := next((part for part in parts if part.weight != 1), None):
            raise InputError(
                f"{option}: {weighted.place} has the weight {weighted.weight:g}. Weights are for "
                "the training data of task custom."
            )
        splits[split] = _Joined(parts)
    return splits


def read_parts(source: str | Path, *, option: str = "data") -> dict[str, list[Part]]:
    """Find records by split and file; the arguments and order are those of `read_splits`.

    The records are read when they are iterated over: an invalid one raises there.

    Raises:
        InputError: The source does not exist, or cannot be reached. Weights are allowed.
    """
    splits: dict[str, list[Part]] = {}
    for one in sources_of(str(source), option):
        for split, parts in _read(one, option).items():
            splits.setdefault(split, []).extend(parts)
    return {split: splits[split] for split in _ORDER if split in splits}


def data_files(source: str) -> list[Path]:
    """Return the local files of a source, in the order of reading; none for a Hub id."""
    found = []
    for one in sources_of(source):
        found += _local_files(one.place)
    return found


def _local_files(place: str) -> list[Path]:
    if place == STDIN:
        return [stdin_copy()]
    if is_url(place):
        copy = cached(place)
        return [copy] if copy.is_file() else []
    path = expanded(place)
    if os.path.isdir(path):
        return _files_in(path)
    return [path] if os.path.isfile(path) else []


def _read(given: Source, option: str) -> dict[str, list[Part]]:
    source, weight = given.place, given.weight
    if source == STDIN:
        return {"train": [Part(SHOWN, _FileRecords(stdin_copy(), SHOWN), weight)]}
    if is_url(source):
        return {"train": [Part(source, _FileRecords(download(source, option)), weight)]}
    path = expanded(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise InputError(f"{option}: {source!r:.300} is not a path: {reason_of(error)}") from error
    if is_folder:
        return _read_folder(path, weight)
    if is_file:
        return {"train": [Part(source, _FileRecords(path), weight)]}
    check_ordinary(path, f"{option}: {source}")
    if _looks_local(source):
        raise InputError(f"{option}: file not found: there is no file or folder {source}.")
    return _read_hub(source, option, weight)


def _looks_local(source: str) -> bool:
    """Return whether a missing source was meant as a path: anything but `owner/name`."""
    path = Path(source)
    return (
        not _HUB_ID.fullmatch(source)
        or path.suffix.lower() in (*SUFFIXES, *COMPRESSIONS, ".tsv", ".txt", ".zip")
        or path.parent.is_dir()  # owner/ exists here: a file in it was meant
    )


def _read_folder(folder: Path, weight: float) -> dict[str, list[Part]]:
    files = _files_in(folder)
    if not files:
        raise InputError(f"{folder} holds no data files ({', '.join(SUFFIXES)}).")
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    # A file without a split would silently become training data.
    if any(named.values()) and not all(named.values()):
        unnamed = next(path for path, split in named.items() if split is None)
        raise InputError(
            f"{folder}: some file names contain train, test or validation, but {unnamed.name} does "
            "not. Give one file, or name all of them."
        )
    splits: dict[str, list[Part]] = {}
    for path, split in named.items():
        splits.setdefault(split or "train", []).append(Part(str(path), _FileRecords(path), weight))
    return splits


def _files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder and its subfolders, sorted by path.

    Raises:
        InputError: A folder cannot be read, an entry named like a data file is not a file, or the
            folder has more than `_MOST_ENTRIES` files.
    """
    found: list[Path] = []
    seen = 0
    described: set[str] = set()  # folders of `datasets`
    for place, names, count in _folders(folder):
        seen += count
        if any(name in _BESIDE_ARROW for name in names):
            described.add(place)
        # Such as a home directory given by mistake.
        if seen > _MOST_ENTRIES:
            raise InputError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files. Give the folder of the data "
                "files alone."
            )
        for name in names:
            path = Path(place, name)
            if data_suffix(name) is not None and not name.startswith("."):
                check_ordinary(path, str(path))
                found.append(path)
    if any(path.suffix == ".arrow" for path in found):
        found = [path for path in found if path.name not in _BESIDE_ARROW]
        found = [
            path
            for path in found
            if not (path.match(f"{_CACHED}*.arrow") and str(path.parent) in described)
        ]
    return sorted(found)


def _folders(folder: Path) -> Iterator[tuple[str, list[str], int]]:
    """Yield a folder and its subfolders: path, names of files, number of entries.

    Hidden subfolders are left out: they have copies of files, such as `.ipynb_checkpoints`. Links
    to other folders come last, each folder once.
    """
    visited: set[str] = set()
    tops = [str(folder)]
    for top in tops:  # links are added to it
        for place, folders, names in os.walk(top, onerror=_refuse_folder):
            # In place: os.walk then visits these subfolders, in this order.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(place)) in visited:
                folders.clear()
                continue
            visited.add(real)
            tops += filter(os.path.islink, [os.path.join(place, name) for name in folders])
            yield place, names, len(names) + len(folders)


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _split_of(path: Path) -> str | None:
    """Return the split named in a path; the file's name takes precedence over its folders'.

    Raises:
        InputError: The name has words of several splits.
    """
    for part in (path.stem, *reversed(path.parent.parts)):
        words = re.split(r"[^a-z]+", part.lower())
        found = sorted({_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS})
        if len(found) > 1:
            raise InputError(f"{path}: {part} names the splits {' and '.join(found)}. Rename it.")
        if found:
            return found[0]
    return None


def _check_hub(name: str, option: str) -> None:
    """Check once that the Hub is reachable; `datasets` would retry for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:  # use the cached copy
        return
    url = hf_hub_url(name, ".gitattributes", repo_type="dataset")
    try:
        get_hf_file_metadata(url)
    except HfHubHTTPError:
        return  # the Hub is reachable; `datasets` reports errors of the data set
    except Exception as error:  # its type depends on the HTTP library of the Hub client
        raise InputError(
            f"{option}: {name} is no local file or folder, and {url} cannot be reached: "
            f"{reason_of(error)}. --{option} also takes a local file or folder; HF_HUB_OFFLINE=1 "
            "uses a cached copy."
        ) from error


def _read_hub(name: str, option: str, weight: float) -> dict[str, list[Part]]:
    import datasets

    path, _, names = name.partition(":")
    configuration, _, chosen = names.partition(":")
    _check_hub(path, option)
    try:
        loaded = datasets.load_dataset(path, *filter(None, [configuration]))
        splits = {split: _RowRecords(loaded[split]) for split in loaded}
    except Exception as error:  # many types, from several libraries: all mean "no data"
        if not configuration and (missing := _MISSING_CONFIGURATION.search(str(error))):
            raise InputError(
                f"{option}: {name} has the configurations {missing[1]}. Give one of them, as "
                f"{name}:CONFIGURATION."
            ) from error
        raise InputError(
            f"{option}: {name} is no local file or folder, and the Hugging Face Hub gave no data "
            f"set of that name ({reason_of(error)}). --{option} also takes a local file or folder."
        ) from error
    if chosen:
        if chosen not in splits:
            raise InputError(
                f"{option}: {name} names a split that does not exist. The splits are "
                f"{', '.join(splits)}."
            )
        return {"train": [Part(name, splits[chosen], weight)]}
    # A single split is the data, whatever its name.
    if len(splits) == 1:
        return {"train": [Part(name, next(iter(splits.values())), weight)]}
    known: dict[str, list[Part]] = {}
    for own, records in splits.items():
        if (split := _SPLIT_WORDS.get(own.lower())) is not None:
            known.setdefault(split, []).append(Part(f"{name} ({own})", records, weight))
    if not known:
        raise InputError(
            f"{option}: {name} has the splits {', '.join(splits)}, none of which is train, test "
            f"or validation. Give one of them, as {path}:{configuration}:{next(iter(splits))}."
        )
    if unread := [own for own in splits if own.lower() not in _SPLIT_WORDS]:
        warnings.warn(
            f"{name}: splits that are not read: {', '.join(unread)}. {path}:{configuration}:"
            f"{unread[0]} reads one of them.",
            stacklevel=5,
        )
    return known
