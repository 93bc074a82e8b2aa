"""Data files from the web, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import urllib.parse
from pathlib import Path

from molf.data.fetch import FetchError, fetch, most_bytes
from molf.data.files import SUFFIXES, data_suffix
from molf.disk.files import replacing_file
from molf.errors import InputError

_LONGEST_NAME = 60  # characters; systems allow 255 bytes


def is_url(source: str) -> bool:
    """Return whether a source is an http(s) address rather than a path or a Hub id."""
    return source.startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Return the folder of downloads: `MOLF_CACHE`, else `molf` in the user's cache folder."""
    if folder := os.environ.get("MOLF_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molf"


def cached(url: str) -> Path:
    """Return the path of a data file's local copy, whether or not it exists."""
    name = Path(urllib.parse.urlparse(url).path).name
    # By address: two files of one name do not replace each other.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / f"{digest}-{name[-_LONGEST_NAME:]}"


def download(url: str, option: str) -> Path:
    """Return the path of a data file's local copy; download the file at its first use.

    Args:
        url: The http(s) address of a file of one of `SUFFIXES`, compressed or not.
        option: The option that takes a local path instead, for messages.

    Raises:
        InputError: The address is not that of a data file, or the download fails.
    """
    try:
        suffix = data_suffix(urllib.parse.urlparse(url).path)
    except ValueError as error:  # such as brackets without an IPv6 address
        raise InputError(f"{option}: {url} is not an address: {error}.") from error
    if suffix is None:
        raise InputError(f"{option}: {url} is not the address of a {', '.join(SUFFIXES)} file.")
    target = cached(url)
    if os.path.isfile(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target, then renamed: an interrupted download leaves no partial file.
        with replacing_file(target) as partial:
            fetch(url, partial, most_bytes())
    except FetchError as error:
        raise InputError(
            f"{option}: cannot download {url} ({error}). Give a local copy of it with --{option} "
            "FILE."
        ) from error
    except OSError as error:
        raise InputError(
            f"{option}: {url} cannot be kept in {target.parent}: {error.strerror}. Set MOLF_CACHE "
            f"to a folder that can be written, or give a local copy with --{option} FILE."
        ) from error
    return target
