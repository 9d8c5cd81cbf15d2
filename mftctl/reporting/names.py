"""Names for the files of a report: short, and each only once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from mftctl.reporting.drawing import Figure


def slug(text: str) -> str:
    """A text as part of a file name: lower-case letters, digits and hyphens; `x` where nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


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


def with_own_names(figures: Iterable[Figure]) -> list[Figure]:
    """The figures, each with a name that none before it has."""
    taken: set[str] = set()
    return [replace(figure, name=own_name(figure.name, taken)) for figure in figures]
