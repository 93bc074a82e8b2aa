"""Mask secrets with a recognisable form, such as `ghp_...`."""

from __future__ import annotations

import re

from molf.masking.addresses import MASK

# Not followed by more of a word, nor by the extension of a file.
_NO_FILE = (
    r"(?![\w-])"
    r"(?!\.(?:bin|csv|gz|jsonl?|log|md|parquet|pt|py|safetensors|toml|tsv|txt|ya?ml|zip)\b)"
)

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    + "|".join(
        (
            r"(?s:-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*))",
            r"gh[opsur]_[A-Za-z0-9]{16,}",  # GitHub
            r"github_pat_\w{16,}",
            r"hf_[A-Za-z0-9]{16,}",  # Hugging Face
            r"glpat-[\w-]{16,}",  # GitLab
            # OpenAI, Anthropic: one part is long and has a digit or a capital letter.
            rf"sk-(?:[A-Za-z0-9_]+-)*(?=[a-z_]*[0-9A-Z])\w{{16,}}[\w-]*{_NO_FILE}",
            rf"sk-[a-z]{{20,}}{_NO_FILE}",
            r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
            r"(?:AKIA|ASIA)[0-9A-Z]{12,}",  # AWS
            r"AIza[\w-]{20,}",  # Google
            r"ya29\.[\w-]{16,}",
            r"xox[abeprs]-(?=[\w-]*\d)[\w-]{10,}",  # Slack
            r"eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",  # JSON Web Tokens
            r"npm_[A-Za-z0-9]{30,}",
            r"pypi-[\w-]{30,}",
            r"nvapi-[\w-]{20,}",
            r"gsk_[A-Za-z0-9]{20,}",  # Groq
        )
    )
    + ")"
)


def mask_shapes(text: str) -> str:
    """Return the text with tokens and private keys masked."""
    return _SHAPES.sub(MASK, text)
