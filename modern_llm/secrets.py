"""Secrets taken out of text that leaves the process: logs, errors, manifests, reports, trackers."""

import os
import re
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters of a variable's value from which it is taken for a secret: a shorter one would be found in ordinary words."""

_SECRET_NAME = re.compile(r"TOKEN(?!IZ|S)|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
_NAMES_A_PLACE = re.compile(r"_(PATH|FILE|DIR|FOLDER|HOME|URL)$", re.IGNORECASE)

_WELL_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|xox[abeoprs]-[A-Za-z0-9-]{20,}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r")"
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_URL_PARAMETER = re.compile(
    r"(?<=[?&])((?:access_?|auth_?|x-amz-security-)?token|api_?key|password|secret|sig|(?:x-amz-)?signature)=[^&\s'\"]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A text in which `***` stands for each secret.

    Secrets are the values of environment variables whose names say so (`HF_TOKEN`, `DB_PASSWORD`, `SOME_API_KEY`), user and
    password of a URL, its parameters that are called token, key or signature, and tokens of well-known forms (`hf_…`, `sk-…`).
    """
    for value in _values_of_variables():
        text = text.replace(value, MASK)
    text = _URL_LOGIN.sub(MASK, text)
    text = _URL_PARAMETER.sub(rf"\1={MASK}", text)
    return _WELL_KNOWN.sub(MASK, text)


def record_without_secrets(record: Any) -> Any:
    """The same for every string of nested JSON types, keys included.

    Of a record that is compared with one on disk, both must have gone through it.
    """
    if isinstance(record, str):
        return without_secrets(record)
    if isinstance(record, dict):
        return {record_without_secrets(key): record_without_secrets(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [record_without_secrets(item) for item in record]
    return record


def _values_of_variables() -> list[str]:
    """Secret values of the environment, the longest first: one may be a part of another."""
    named = (value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not _NAMES_A_PLACE.search(name))
    return sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True)
