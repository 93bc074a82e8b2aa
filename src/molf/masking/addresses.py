"""Remove user, password, query and fragment from addresses in text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import parse_qsl

from molf.masking.names import is_secret_in_query

MASK = "***"

_ADDRESS = re.compile(r"(?<![\w+.-])([A-Za-z][A-Za-z0-9+.-]{0,30})://([^\s\"'<>`]+)")
# Without `://`: Oracle's `jdbc:oracle:thin:user/password@`, and `user:password@host`.
_OTHERS = (
    re.compile(r"(?i)(?<![\w:])(jdbc:[a-z0-9:]{1,40}:)[^\s@/]{1,80}/[^\s@]{1,80}@"),
    re.compile(
        r"(?<![\w.%+@:-])()[\w.%+-]{1,60}:(?=[^\s@]{0,80}\d)[^\s@:/\"']{6,80}@(?=[A-Za-z])(?!sha\d+:)"
    ),
)
_WHOLE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://(.+)", re.DOTALL)
_AFTER = ".,:;!)]}"  # punctuation of the sentence around an address
_TOKEN = 16  # characters; a shorter user or unnamed value is taken for an ordinary word
_PORT = re.compile(r"\[[^\]]*\](?::\d*)?|[^:]*(?::\d*)?")

# Schemes without a port: `:` separates a key from its secret, which may hold a slash.
_BUCKETS = frozenset({"s3", "s3a", "s3n", "gs", "gcs", "az", "adl", "r2", "oss", "cos"})
# Schemes with the name of a container before the `@`.
_CONTAINERS = frozenset({"abfs", "abfss", "wasb", "wasbs"})


class _Parts(NamedTuple):
    """An address, `scheme://user@place?query`. `user` and `query` may be secret."""

    scheme: str
    user: str
    place: str
    query: str


def strip_addresses(text: str) -> str:
    """Return the text with user, password, query and fragment removed from each address."""
    text = _ADDRESS.sub(lambda found: _stripped(found[1], found[2]), text)
    for pattern in _OTHERS:
        text = pattern.sub(rf"\g<1>{MASK}@", text)
    return text


def secrets_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield the secret parts of the addresses in a text.

    Args:
        text: An option or a variable's value. If it begins as an address, all of it is one.

    Yields:
        A literal, and its replacement.
    """
    whole = _WHOLE.fullmatch(text.strip())
    for scheme, rest in [whole.groups()] if whole else _ADDRESS.findall(text):
        parts = _split(scheme, rest)
        if parts.user or parts.query:
            yield f"{scheme}://{rest}", f"{scheme}://{parts.place}"
        if ":" in parts.user or len(parts.user) >= _TOKEN:  # otherwise a user name, no secret
            yield parts.user.rpartition(":")[2], MASK
        for name, value in parse_qsl(parts.query):
            if is_secret_in_query(name) or len(value) >= _TOKEN:
                yield value, MASK


def _stripped(scheme: str, rest: str) -> str:
    body = rest.rstrip(_AFTER)
    parts = _split(scheme, body)
    return f"{scheme}://{parts.place}{rest[len(body) :]}"


def _split(scheme: str, rest: str) -> _Parts:
    host = re.split(r"[/?#;\\]", rest, maxsplit=1)[0]
    user = ""
    if "@" in host and not (scheme.lower() in _CONTAINERS and ":" not in host):
        user, _, host = host.rpartition("@")
        rest = rest[len(user) + 1 :]
    is_cut = not _PORT.fullmatch(host) or (scheme.lower() in _BUCKETS and ":" in host)
    if is_cut:  # the text after the colon is a password with a slash, not a port
        more, _, rest = rest.rpartition("@")
        user = ":".join(filter(None, (user, more or rest)))
        rest = rest if more else MASK  # no `@`: the address was cut short
        host = re.split(r"[/?#;\\]", rest, maxsplit=1)[0]
    path = re.split(r"[?#]", rest[len(host) :], maxsplit=1)[0]
    if path.startswith(";"):  # SQL Server: properties such as `;password=...`
        path = ""
    place = host + path
    return _Parts(scheme, user, place, rest[len(place) + 1 :])
