"""Data files from the web, kept in a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.parse
import urllib.request
from pathlib import Path

from molf.errors import InputError
from molf.tasks.files import SUFFIXES, first_line
from molf.train.files import replacing_file

_TIMEOUT = 60  # seconds without an answer


def is_url(source: str) -> bool:
    """Whether a source is an http(s) address rather than a path or a Hub id."""
    return source.startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads are kept: `MOLF_CACHE`, else `molf` in the user's cache folder."""
    if folder := os.environ.get("MOLF_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molf"


def cached(url: str) -> Path:
    """Where the local copy of a data file is, or would be."""
    name = Path(urllib.parse.urlparse(url).path).name
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / f"{digest}-{name}"


def download(url: str, option: str) -> Path:
    """The local copy of a data file, downloaded at its first use and never again.

    Args:
        url: The http(s) address of a JSON, JSON lines, Parquet or CSV file.
        option: The option that takes a local path instead, for messages.

    Raises:
        InputError: The address names no data file or does not answer.
    """
    if Path(urllib.parse.urlparse(url).path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{option}: {url} is not the address of a {', '.join(SUFFIXES)} file.")
    target = cached(url)
    if target.is_file():
        return target
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            # read() without a size checks that all of the announced length has come.
            content: bytes = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(
            f"{option}: cannot download {url} ({first_line(error)}). "
            f"Give a local copy of it with --{option} FILE."
        ) from error
    try:
        _keep(content, target)
    except OSError as error:
        raise InputError(
            f"{option}: {url} cannot be kept in {target.parent}: {error.strerror}. Set MOLF_CACHE "
            f"to a folder that can be written, or give a local copy with --{option} FILE."
        ) from error
    return target


def _keep(content: bytes, target: Path) -> None:
    """Write a file beside its place and rename it: half of one must not look like the whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(target) as partial:
        partial.write_bytes(content)
