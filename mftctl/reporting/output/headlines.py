"""The main results of a report, one sentence per metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mftctl.reporting.next_step import is_learned_mask
from mftctl.reporting.output.text_tables import interval_text
from mftctl.reporting.paired_change import LOWER_IS_BETTER
from mftctl.reporting.state_tables import MetricTable, Row


@dataclass(frozen=True, slots=True)
class Headline:
    """The effect of a learned mask on one metric.

    Attributes:
        text: The sentence.
        verdict: `better`, `worse` or `within noise`.
        runs: The evaluation runs it comes from.
    """

    text: str
    verdict: str
    runs: tuple[str, ...]


def headlines(tables: Sequence[MetricTable]) -> list[Headline]:
    """One headline per table with a learned mask, about the best mask in it; none about data to retain."""
    several = len({table.origin for table in tables}) > 1
    found = []
    for table in tables:
        if table.is_retained:
            continue
        masks = [row for row in table.rows if is_learned_mask(row) and row.change is not None]
        if masks:
            best = (min if table.metric in LOWER_IS_BETTER else max)(masks, key=lambda row: row.value)
            found.append(_headline(table, best, several))
    return found


def _is_control(row: Row) -> bool:
    return row.made is not None and row.made.is_plain_training


def _baseline(table: MetricTable, row: Row) -> str:
    return ", ".join(row.against) or table.baseline


def _headline(table: MetricTable, row: Row, several_models: bool) -> Headline:
    if row.change is None:
        raise ValueError(f"{row.state} has no change to report")
    of = f" for {Path(table.origin).name}" if several_models else ""
    seeds = f", {len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
    measured = f"{row.samples:,} samples{seeds}"
    found = row.against_control
    if found is None or found.is_baseline:
        change = row.change
        text = (
            f"{row.state} changes {table.metric} on {table.dataset}{of} by {change.value:+.4f} {interval_text(change)}"
            f" against {_baseline(table, row) if found is None else found.control}: {change.verdict} ({measured})."
        )
        if found is not None and sum(1 for other in table.rows if _is_control(other)) == 1:
            text += " No other control was measured."
        return Headline(text, change.verdict, row.runs)
    change, baseline = found.change, _baseline(table, row)
    text = (
        f"{row.state} changes {table.metric} on {table.dataset}{of} by {change.value:+.4f} {interval_text(change)}"
        f" against {found.control}, its strongest control: {change.verdict} ({measured}). Against {baseline}:"
        f" {row.change.value:+.4f} {interval_text(row.change)}, {row.change.verdict}."
    )
    if row.change.verdict == "better" and change.verdict != "better":
        text += f" {row.state} beats only the weaker of the two."
    return Headline(text, change.verdict, row.runs)
