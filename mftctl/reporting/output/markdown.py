"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mftctl.reporting.output.text_tables import (
    TextCell,
    TextTable,
    efficiency_text,
    flag_lines,
    metric_text,
    overview_text,
)
from mftctl.text import markdown_code, markdown_item, markdown_label, markdown_text

if TYPE_CHECKING:
    from mftctl.reporting.report import Report

NOTE = (
    "The interval is the paired 95 % bootstrap interval over test samples. A change whose interval holds 0 is within"
    " noise; * marks the others. ± is the standard deviation over seeds. p is that of McNemar's exact test, for scores"
    " of 0 and 1 of one seed, and of its extension to sums over several; corrected by Holm's method for the number of"
    " benchmarks."
)
EFFICIENCY_NOTE = (
    "Speeds are those of the steps after the first, without validations and checkpoints; they compare where the machine"
    " was as busy. FLOPs count the products with"
    " weights: 2 a weight and token forward, 2 for the gradient of the input where anything below is trained, 2 for its"
    " own where it is trained. Memory is the most that was held: of the GPU, on a CPU of the whole process."
)


def to_markdown(report: Report) -> str:
    """The whole report; figures are those beside it."""
    parts = ["# mftctl report", "", f"Next: {markdown_code(report.advice.command)}. {report.advice.reason}", ""]
    for overview in report.overviews:
        parts += [*table_lines(overview_text(overview)), ""]
    for table in report.tables:
        parts += [*table_lines(metric_text(table)), ""]
        flagged = [f"- {markdown_item(f'{states}: {flag}')}" for states, flag in flag_lines(table)]
        if flagged:
            parts += ["Made in another way than its comparison:", "", *flagged, ""]
    if report.tables:
        parts += [NOTE, ""]
    if report.efficiency:
        parts += [*table_lines(efficiency_text(report.efficiency)), "", EFFICIENCY_NOTE, ""]
    for figure in report.figures:
        label = markdown_label(figure.title)
        parts += [f"## {markdown_text(figure.title)}", "", f"![{label}](figures/{figure.name}.svg)", ""]
        parts += [markdown_item(f"{figure.caption} Runs: {', '.join(figure.runs)}."), ""]
    parts += list(_ending(report))
    return "\n".join(parts).rstrip("\n") + "\n"


def table_lines(table: TextTable) -> list[str]:
    """A heading and a table; numbers are followed by the runs they come from."""
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
        yield from ("## Runs", "", "Each is made again by its command, where its inputs still are.", "")
        for source in report.sources:
            about = markdown_item(f"{source.name}, {source.made}, seed {source.seed}")
            yield f"- {about}: {markdown_code(source.reproduction)}"
        yield ""
    for heading, lines in (("Not finished", report.unfinished), ("Left out", report.problems)):
        if lines:
            yield from (f"## {heading}", "", *(f"- {markdown_item(line)}" for line in lines), "")
