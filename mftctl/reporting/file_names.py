"""Names for the files of a report: short, and each only once."""

from __future__ import annotations

import hashlib
import re

_LONGEST = 60
"""Two of them with words around them, and a temporary name beside that, are a name that every file system holds."""

_DIGEST_DIGITS = 8


def slug(text: str) -> str:
    """A text as part of a file name: lower-case letters, digits and hyphens; `x` where nothing is left.

    A long one is cut, with a digest of the whole behind it.
    """
    whole = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
    if len(whole) <= _LONGEST:
        return whole
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
    return f"{whole[: _LONGEST - _DIGEST_DIGITS - 1].rstrip('-')}-{digest}"


def own_name(name: str, taken: set[str]) -> str:
    """The name, with a number behind it if it came before: `probe`, `probe-2`.

    Args:
        name: As wished.
        taken: The names so far; gets the new one.
    """
    own, number = name, 1
    while own in taken:
        number += 1
        own = f"{name}-{number}"
    taken.add(own)
    return own
