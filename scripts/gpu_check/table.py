"""Formats the findings as a table for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scripts.gpu_check.findings import Check, Finding, Measurement
from scripts.gpu_check.isolated import End


def markdown(title: str, findings: Mapping[str, Sequence[Finding]], ends: Mapping[str, End]) -> str:
    """Returns the table, with one section per step.

    Args:
        title: Date and hardware.
        findings: Findings of each step.
        ends: Outcome of each step.
    """
    parts = [f"## {title}"]
    for step, found in findings.items():
        end = ends[step]
        parts.append(f"### {step}: {end.status} after {end.seconds:.0f} s")
        if end.error:
            parts.append(f"```\n{end.error.strip()}\n```")
        measurements = [item for item in found if isinstance(item, Measurement)]
        if measurements:
            rows = ["| | measured | `validate` |", "|---|---|---|", *map(_row, measurements)]
            parts.append("\n".join(rows))
        checks = [item for item in found if isinstance(item, Check)]
        if checks:
            parts.append("\n".join(_line(check) for check in checks))
    return "\n\n".join(parts) + "\n"


def _row(measurement: Measurement) -> str:
    estimate = "" if measurement.estimate is None else _number(measurement.estimate, measurement.unit)
    return f"| {measurement.what} | {_number(measurement.value, measurement.unit)} | {estimate} |"


def _number(value: float | str, unit: str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g} {unit}".strip()


def _line(check: Check) -> str:
    detail = f" ({check.detail.splitlines()[-1]})" if check.detail else ""
    return f"- {'holds' if check.holds else '**does not hold**'}: {check.what}{detail}"
