"""Names for the files of figures: short, and each only once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from mftctl.reporting.drawing import Figure


def slug(text: str) -> str:
    """A text as part of a file name: lower-case letters, digits and hyphens; `x` where nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def with_own_names(figures: Iterable[Figure]) -> list[Figure]:
    """The figures with a number behind each name that came before: `probe`, `probe-2`."""
    taken: set[str] = set()
    named = []
    for figure in figures:
        name, number = figure.name, 1
        while name in taken:
            number += 1
            name = f"{figure.name}-{number}"
        taken.add(name)
        named.append(replace(figure, name=name))
    return named
