"""Short, unique file names for a report."""

from __future__ import annotations

import hashlib
import re

_LONGEST = 60
"""Short enough that two slugs plus other words and a temporary suffix form a valid name on any file system."""

_DIGEST_DIGITS = 8


def slug(text: str) -> str:
    """Converts a text for use in a file name: lower-case letters, digits and hyphens; `x` if nothing is left.

    A long text is cut and a digest of the whole text appended.
    """
    whole = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
    if len(whole) <= _LONGEST:
        return whole
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
    return f"{whole[: _LONGEST - _DIGEST_DIGITS - 1].rstrip('-')}-{digest}"


def own_name(name: str, taken: set[str]) -> str:
    """The name, with a number appended if it is already taken: `probe`, `probe-2`.

    Args:
        name: The preferred name.
        taken: The names in use; the new name is added.
    """
    own, number = name, 1
    while own in taken:
        number += 1
        own = f"{name}-{number}"
    taken.add(own)
    return own
