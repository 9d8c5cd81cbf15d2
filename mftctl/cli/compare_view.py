"""Console view of two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mftctl.cli.output import Output, pairs_table
from mftctl.experiments.find_run import find_run
from mftctl.experiments.run_folder import Run
from mftctl.reporting.two_runs import Difference, MaskOverlap, PairedMetric, RunComparison, compare_two
from mftctl.text import counted

_COLOURS = {"better": "green", "worse": "red"}
_CURVES = ("evaluations.", "flips.rounds.")
"""Results with one value per step, better shown by the figures of a report."""
_DIGEST_CHARACTERS = 64
_DIGEST_SHOWN = 12


def show_comparison(console: Output, root: Path, one: str, other: str) -> None:
    """Prints the comparison of two runs, as tables or as one JSON document.

    Args:
        console: The output.
        root: The runs folder.
        one: Folder, number or name of the baseline run.
        other: Folder, number or name of the run compared with the baseline.

    Raises:
        RunError: One of the runs does not exist or cannot be read.
    """
    first, second = find_run(root, one), find_run(root, other)
    found = compare_two(first, second)
    console.result(asdict(found), *_views(found, first, second))
    for problem in found.problems:
        console.warn(problem)
    if found.mask is not None:
        console.next_command("mftctl", "mask", "diff", *(run.folder / "mask.bits" for run in (first, second)))


def _views(found: RunComparison, first: Run, second: Run) -> list[RenderableType]:
    views: list[RenderableType] = [pairs_table("Runs", [_described(first), _described(second)])]
    for title, differences in (("Settings", found.settings), ("Inputs", found.inputs), ("Versions", found.versions)):
        views.append(_table(title, found, differences) if differences else f"{title}: no difference")
    if found.metrics:
        views.append(_metrics(found))
    # The table above has the metrics of an evaluation, with their intervals.
    told = {f"datasets.{item.dataset}.metrics.{item.metric}." for item in found.metrics}
    results = [item for item in found.results if not item.key.startswith((*told, *_CURVES))]
    views.append(_table("Results", found, results, change=True) if results else "Results: no difference")
    for prefix in _CURVES:
        values = sum(item.key.startswith(prefix) for item in found.results)
        if values:
            views.append(
                f"{prefix.rstrip('.')}: {counted(values, 'difference')} in values per step (--json lists them)"
            )
    if found.mask is not None:
        views.append(_mask(found, found.mask))
    return views


def _described(run: Run) -> tuple[str, str]:
    record = run.record
    stage = "" if record.stage is None else f", stage {record.stage}"
    return run.name, f"seed {record.config.get('seed', 0)}{stage}, {record.status}, started {record.started}"


def _table(
    title: str, found: RunComparison, differences: Sequence[Difference], *, change: bool = False
) -> RenderableType:
    table = Table(title=title, title_justify="left")
    table.add_column("key", overflow="fold")
    for name in (found.one, found.other):
        table.add_column(escape(name), overflow="fold", justify="right" if change else "left")
    if change:
        table.add_column("difference", justify="right")
    for item in differences:
        cells = [escape(_text(item.one)), escape(_text(item.other))]
        table.add_row(escape(item.key), *cells, *([_signed(item.change)] if change else []))
    return table


def _metrics(found: RunComparison) -> Table:
    table = Table(title="Measured on the same samples", title_justify="left")
    table.add_column("metric", overflow="fold")
    for name in (found.one, found.other):
        table.add_column(escape(name), justify="right")
    table.add_column("difference [95 %]", justify="right", overflow="fold")
    table.add_column("verdict")
    for item in found.metrics:
        table.add_row(
            escape(f"{item.dataset}, {item.metric} of {item.samples:,}"),
            f"{item.one:.4f}",
            f"{item.other:.4f}",
            f"{item.change.value:+.4f} [{item.change.low:+.4f}, {item.change.high:+.4f}]",
            _verdict(item),
            style=_COLOURS.get(item.change.verdict),
        )
    return table


def _verdict(item: PairedMetric) -> str:
    change = item.change
    if change.p_value is None:
        return change.verdict
    several = "" if change.corrected_p_value == change.p_value else f", corrected {change.corrected_p_value:.2g}"
    return f"{change.verdict} (p = {change.p_value:.2g}{several})"


def _mask(found: RunComparison, overlap: MaskOverlap) -> Table:
    rows = [
        ("weights covered by both", f"{overlap.weights:,}"),
        (f"removed by {found.one}", f"{overlap.removed_one:,}"),
        (f"removed by {found.other}", f"{overlap.removed_other:,}"),
        ("removed by both", f"{overlap.removed_both:,}"),
        ("Jaccard", f"{overlap.jaccard:.4f}; expected by chance {overlap.expected_jaccard:.4f}"),
    ]
    for name, only in ((found.one, overlap.only_one), (found.other, overlap.only_other)):
        if only:
            rows.append((f"only in {name}", f"{counted(len(only), 'tensor')}, for example {only[0]}"))
    return pairs_table("Masks", rows)


def _text(value: Any) -> str:
    """Returns a readable value: short digests, thousands separators, four decimals."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:,.4f}".rstrip("0").rstrip(".")
    text = str(value)
    is_digest = len(text) == _DIGEST_CHARACTERS and set(text) <= set("0123456789abcdef")
    return text[:_DIGEST_SHOWN] if is_digest else text


def _signed(change: float | None) -> str:
    if change is None:
        return ""
    return f"{change:+,}" if isinstance(change, int) else f"{change:+.4g}"
