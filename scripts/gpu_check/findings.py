"""The findings of a step: measured values with their estimates, and checks that pass or fail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured value.

    Attributes:
        what: Name of the value.
        value: A number or a text.
        unit: Unit of the number.
        estimate: Estimate by `mftctl validate` in the same unit; None if it has none.
    """

    what: str
    value: float | str
    unit: str = ""
    estimate: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A condition that must hold.

    Attributes:
        what: The condition.
        holds: Whether it holds.
        detail: The result found.
    """

    what: str
    holds: bool
    detail: str = ""


Finding = Measurement | Check


def to_line(step: str, finding: Finding) -> dict[str, Any]:
    """A finding as plain data for a line of JSON.

    Args:
        step: Name of the step.
        finding: The finding.
    """
    return {"step": step, "kind": "measurement" if isinstance(finding, Measurement) else "check", **asdict(finding)}
