"""Recognise names whose value is a secret: `--api-key`, `HF_TOKEN`, `"clientSecret"`."""

from __future__ import annotations

import re
from functools import lru_cache


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Last words that end in one of these: `password`, `dbpassword`.
_SECRET = tuple(
    _set(
        "accesskey accountkey apikey credential passcode passphrase passwd password privatekey "
        "secret secretkey sessid sessionid signature token"
    )
)
# Secrets that people choose, so that they may be any word.
_WORDS = tuple(_set("credential passcode passphrase passwd password secret"))
_PLURALS = _set("credentials keys passphrases passwords secrets")
_SECRET_WORDS = _set("auth authorization bearer cookie jwt pwd sas sig")
# Words before `token` for a tokenizer's tokens: `eos_token`, `loss per token`.
_TOKENS_OF_TEXT = _set(
    "a an audio begin bos boi by class cls each end eoi eos every first image last mask new "
    "next of other pad per prefix sep special start stop suffix the this unk video vision"
)
_KEYS = _set(
    "access account admin api app auth client deploy encryption host license master private "
    "secret security service session shared sign signing ssh storage subscription webhook "
    "write"
)
_PASSES = _set("admin database db ftp mail proxy root smtp user")
_IN_QUERIES = _set("key code policy state ticket session sid")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether an option, variable, field or header of this name has a secret value.

    Args:
        name: Any spelling: `hub_token`, `--api-key`, `training_args.hub_token`, `AccountKey`.
    """
    words = _words(name)
    if not words:
        return False
    last = words[-1]
    before = words[-2] if len(words) > 1 else ""
    if last == "token":
        return before not in _TOKENS_OF_TEXT
    if last == "key":
        return before in _KEYS
    if last == "pass":
        return not before or before in _PASSES
    if last == "id":  # AWS: access_key_id
        return before == "key" and len(words) > 2 and words[-3] in _KEYS
    if last == "string":
        return before == "connection"
    if last == "base":  # Rails and Django: secret_key_base
        return before == "key" and words[-3:-2] == ["secret"]
    return last in _SECRET_WORDS or last.endswith(_SECRET)


def is_secret_in_query(name: str) -> bool:
    """Return whether a name in the query of an address has a secret value; `key` and `code` do."""
    return name.lower() in _IN_QUERIES or is_secret_name(name)


def is_secret_of_any_form(name: str) -> bool:
    """Return whether a secret of this name may be any word or number (password, but not token)."""
    last = _words(name)[-1]
    return last in ("id", "key", "pwd") or last.endswith(("key", *_WORDS))


def _words(name: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(name)]
    if words and words[-1] in _PLURALS:
        words[-1] = words[-1][:-1]
    return words
