"""Console output of `mftctl data`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mftctl.cli.record_view import needs_marks, record_text, trained_on
from mftctl.text import counted

if TYPE_CHECKING:
    from mftctl.workflows.data_fetch import FetchedData
    from mftctl.workflows.data_show import ShownData, ShownRecord
    from mftctl.workflows.data_stats import DataStats, Found, LengthBin, PartStats

_BAR_CHARACTERS = 40


def show_views(data: ShownData) -> list[RenderableType]:
    """Returns the records to print."""
    marked = needs_marks()
    return [_record(record, data, marked=marked) for record in data.shown]


def _record(record: ShownRecord, data: ShownData, *, marked: bool) -> Text:
    head = f"{record.index:,} of {data.records:,}, {record.where}: "
    if record.outcome != "used":
        return record_text(f"{head}{record.outcome}", [(record.error or "", False)], marked=marked)
    lines = [head + trained_on(record.answer_tokens, record.tokens, marked=marked)]
    if record.cut_tokens:
        lines.append(f"truncated at --max-length {data.max_length_tokens}: {counted(record.cut_tokens, 'token')} cut")
    segments = [(segment.text, segment.is_answer) for segment in record.segments]
    if record.rejected:
        segments += [("\nrejected: ", False), *((segment.text, segment.is_answer) for segment in record.rejected)]
    return record_text("\n".join([*lines, *record.remarks]), segments, marked=marked)


def stats_views(stats: DataStats) -> list[RenderableType]:
    """Returns the tables to print, in reading order."""
    views: list[RenderableType] = [_parts(stats)]
    for part in stats.parts:
        if part.tokens is not None and part.tokens.lengths is not None:
            views.append(_histogram(part.part, part.tokens.lengths.histogram))
    if stats.overlaps:
        views.append(_overlaps(stats))
    lines = list(_examples(stats))
    return [*views, Text("\n".join(lines))] if lines else views


def fetch_views(found: Sequence[FetchedData]) -> list[RenderableType]:
    """Returns the table of benchmark data to print."""
    view = Table(title="Benchmark data", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("")
    view.add_column("from", overflow="fold")
    view.add_column("problems", justify="right")
    view.add_column("")
    for data in found:
        view.add_row(data.benchmark, data.source, "" if data.records is None else f"{data.records:,}", data.state)
    return [view]


def _parts(stats: DataStats) -> Table:
    view = Table(title="Data", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("")
    columns = []
    for part in stats.parts:
        view.add_column(part.part, justify="right")
        columns.append(dict(_rows(part, stats.max_length_tokens)))
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        view.add_row(name, *(column.get(name, "") for column in columns))
    return view


def _rows(part: PartStats, max_length_tokens: int) -> Iterator[tuple[str, str]]:
    yield "records", f"{part.records:,}"
    yield "refused", f"{part.refused:,}"
    yield "same content as an earlier record", _count(part.same_content)
    yield "same prompt as an earlier record", _count(part.same_prompt)
    tokens = part.tokens
    if tokens is None:
        return
    yield "tokens", f"{tokens.tokens:,}"
    yield "tokens trained on", f"{tokens.answer_tokens:,}"
    if tokens.lengths is not None:
        lengths = tokens.lengths
        yield "length: minimum", f"{lengths.least:,}"
        yield "median", f"{lengths.median:,}"
        yield "90 %", f"{lengths.p90:,}"
        yield "99 %", f"{lengths.p99:,}"
        yield "maximum", f"{lengths.most:,}"
    if part.preferences is not None:
        yield "preferences", f"{part.preferences.records:,}"
        for name, answers in (("chosen", part.preferences.chosen), ("rejected", part.preferences.rejected)):
            yield f"{name} answer: median", f"{answers.median:,}"
            yield f"{name} answer: maximum", f"{answers.most:,}"
    yield f"truncated at {max_length_tokens}", f"{tokens.truncated:,} ({tokens.truncated_share:.1%})"
    yield "prompt alone too long", f"{tokens.overlong:,}"


def _histogram(part: str, bins: Sequence[LengthBin]) -> Table:
    view = Table(title=f"Lengths: {part}", title_justify="left", show_header=False, box=None, pad_edge=False)
    for justify in ("right", "right", "left"):
        view.add_column(justify=justify)
    highest = max(one.records for one in bins)
    for one in bins:
        bar = "#" * -(-_BAR_CHARACTERS * one.records // highest)
        view.add_row(f"{one.least:,} to {one.most:,} tokens", f"{one.records:,}", bar)
    return view


def _overlaps(stats: DataStats) -> Table:
    view = Table(title="Overlap", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("records of")
    view.add_column("also in")
    for name in ("same content", "same prompt", "13 words in a row"):
        view.add_column(name, justify="right")
    for overlap in stats.overlaps:
        found = (overlap.same_content, overlap.same_prompt, overlap.ngrams)
        view.add_row(overlap.part, overlap.other, *("" if one is None else _count(one) for one in found))
    return view


def _count(found: Found) -> str:
    return f"{found.records:,} ({found.share:.1%})" if found.records else "0"


def _examples(stats: DataStats) -> Iterator[str]:
    """Yields a line for each kind of problem, with the first few records."""
    for part in stats.parts:
        for text in part.refused_examples:
            yield f"{part.part}, refused: {text}"
        yield from _pairs(f"{part.part}, same content", part.same_content)
        yield from _pairs(f"{part.part}, same prompt", part.same_prompt)
    for overlap in stats.overlaps:
        between = f"{overlap.part} and {overlap.other}"
        yield from _pairs(f"{between}, same content", overlap.same_content)
        yield from _pairs(f"{between}, same prompt", overlap.same_prompt)
        if overlap.ngrams is not None:
            yield from _pairs(f"{between}, 13 words in a row", overlap.ngrams)


def _pairs(title: str, found: Found) -> Iterator[str]:
    if found.examples:
        yield f"{title}: {'; '.join(f'{pair.where} = {pair.other}' for pair in found.examples)}"
