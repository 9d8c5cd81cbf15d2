"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mftctl.reporting.output.text_tables import (
    TextCell,
    TextTable,
    efficiency_text,
    flag_lines,
    frontier_text,
    metric_text,
    overview_text,
    preferences_text,
)
from mftctl.text import markdown_code, markdown_item, markdown_label, markdown_text

if TYPE_CHECKING:
    from mftctl.reporting.report import Report

NOTE = (
    "Intervals are paired 95 % bootstrap intervals over test samples. A change whose interval includes 0 is within"
    " noise; * marks all other changes. ± is the standard deviation over seeds. For scores of 0 and 1, p comes from"
    " McNemar's exact test with one seed and from its extension to sums with several; corrected values apply Holm's"
    " method over the benchmarks."
)
EFFICIENCY_NOTE = (
    "Speeds cover the steps after the first, without validation and checkpoints; compare them only between equally"
    " loaded machines. FLOPs count matrix products with weights, per"
    " weight and token: 2 in the forward pass, 2 for the gradient of the input if anything below is trained, and 2 for"
    " the gradient of the weight if it is trained. Memory is the peak of the GPU, or of the whole process on a CPU."
)


PREFERENCES_NOTE = (
    "Measured on the validation records of each training (of masks, half of them); the loss before training is"
    " ln 2 = 0.6931. Reward: beta times the change of an answer's log-probability."
)


def to_markdown(report: Report) -> str:
    """The whole report, with links to the figures in the report folder."""
    parts = ["# mftctl report", "", f"Next: {markdown_code(report.advice.command)}. {report.advice.reason}", ""]
    for overview in report.overviews:
        parts += [*table_lines(overview_text(overview)), ""]
    for frontier in report.frontiers:
        parts += [*table_lines(frontier_text(frontier)), ""]
    for table in report.tables:
        parts += [*table_lines(metric_text(table)), ""]
        flagged = [f"- {markdown_item(f'{states}: {flag}')}" for states, flag in flag_lines(table)]
        if flagged:
            parts += ["Not comparable with its baseline:", "", *flagged, ""]
    if report.tables:
        parts += [NOTE, ""]
    if report.answers:
        parts += ["## Answers", "", *(f"- {markdown_item(changes.title)}" for changes in report.answers), ""]
    if report.preferences:
        parts += [*table_lines(preferences_text(report.preferences)), "", PREFERENCES_NOTE, ""]
    if report.efficiency:
        parts += [*table_lines(efficiency_text(report.efficiency)), "", EFFICIENCY_NOTE, ""]
    for figure in report.figures:
        label = markdown_label(figure.title)
        parts += [f"## {markdown_text(figure.title)}", "", f"![{label}](figures/{figure.name}.svg)", ""]
        parts += [markdown_item(f"{figure.caption} Runs: {', '.join(figure.runs)}."), ""]
    parts += list(_ending(report))
    return "\n".join(parts).rstrip("\n") + "\n"


def table_lines(table: TextTable) -> list[str]:
    """A heading and a table; the last column names the runs that the numbers come from."""
    names = [name for row in table.rows for cell in row for name in cell.runs]
    columns = (*table.columns, "runs") if names else table.columns
    lines = [f"## {markdown_text(table.title)}", "", f"| {' | '.join(map(markdown_text, columns))} |"]
    lines.append(f"|{'|'.join('---:' if numeric else '---' for numeric in table.is_numeric)}{'|---' * bool(names)}|")
    for row in table.rows:
        runs = dict.fromkeys(name for cell in row for name in cell.runs)
        cells = [*map(_cell, row), *([markdown_text(", ".join(runs))] if names else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(cell: TextCell) -> str:
    return markdown_text(f"{cell.text} {cell.detail}".rstrip())


def _ending(report: Report) -> Iterator[str]:
    if report.sources:
        yield from ("## Runs", "", "Each command reproduces its run if the inputs still exist.", "")
        for source in report.sources:
            about = markdown_item(f"{source.name}, {source.made}, seed {source.seed}")
            yield f"- {about}: {markdown_code(source.reproduction)}"
        yield ""
    for heading, lines in (("Not finished", report.unfinished), ("Left out", report.problems)):
        if lines:
            yield from (f"## {heading}", "", *(f"- {markdown_item(line)}" for line in lines), "")
