"""Secrets out of what is printed, kept or sent: tokens, keys and passwords become `[redacted]`."""

import os
import re
from typing import Any

REDACTED = "[redacted]"
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS)$", re.IGNORECASE)
_LEAST = 8  # characters of an environment variable's value: shorter ones are words of ordinary text
# What a key looks like wherever it stands: of Hugging Face, AWS, GitHub, Google (API key, OAuth).
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{24,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[a-z]_[A-Za-z0-9]{36,}|AIza[\w-]{35}"
    r"|ya29\.[\w-]{20,})(?![A-Za-z0-9])"
)
_PASSWORD = re.compile(r"(://)[^/\s:@?#]*:[^/\s?#]+@")
# Only behind ? or &, so that flags such as --data.pad_token= stay.
_PARAMETER = re.compile(
    r"([?&](?:[\w.-]*[-_.])?(?:access|api|auth)?(?:token|key|key_?id|sig|signature|secret|password|credentials?)=)"
    r"[^&#\s\"']+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with `[redacted]` for secrets.

    These are keys of a known form, user:password@ and parameters such as token= or X-Goog-Signature= of URLs, and the
    values, of 8 characters or more, of environment variables whose names end in TOKEN, KEY, SECRET, PASSWORD or
    CREDENTIALS.
    """
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _LEAST}
    for value in sorted(values, key=len, reverse=True):  # one may begin with another
        text = text.replace(value, REDACTED)
    text = _TOKENS.sub(REDACTED, text)
    text = _PASSWORD.sub(rf"\1{REDACTED}@", text)
    return _PARAMETER.sub(rf"\1{REDACTED}", text)


def redact_tree(value: Any) -> Any:
    """Nested dicts, lists and tuples with every string in them redacted; the keys of dicts, our own names, stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_tree(item) for item in value)
    return value
