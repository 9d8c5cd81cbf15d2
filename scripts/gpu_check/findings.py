"""What a step tells: figures, beside what was expected of them, and checks that hold or do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured.

    Attributes:
        what: Its name.
        value: A number, or a text.
        unit: Of the number.
        estimate: What `mftctl validate` says of it beforehand, in the same unit; None where it says nothing.
    """

    what: str
    value: float | str
    unit: str = ""
    estimate: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold.

    Attributes:
        what: A sentence.
        holds: Whether it does.
        detail: What was found.
    """

    what: str
    holds: bool
    detail: str = ""


Finding = Figure | Check


def to_line(step: str, finding: Finding) -> dict[str, Any]:
    """A finding as plain data for a line of JSON.

    Args:
        step: Its step.
        finding: The finding.
    """
    return {"step": step, "kind": "figure" if isinstance(finding, Figure) else "check", **asdict(finding)}
