"""The report as one self-contained HTML file: no network access, no scripts, no other files."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mftctl import __version__
from mftctl.reporting.answers import SHOWN_ANSWERS, AnswerChanges, ChangedAnswer
from mftctl.reporting.figures.style import INK, Drawing, Figure
from mftctl.reporting.output.headlines import headlines
from mftctl.reporting.output.markdown import EFFICIENCY_NOTE, NOTE, PREFERENCES_NOTE
from mftctl.reporting.output.text_tables import (
    TextTable,
    efficiency_text,
    flag_lines,
    frontier_text,
    metric_text,
    overview_text,
    preferences_text,
)
from mftctl.text import visible, visible_line

if TYPE_CHECKING:
    from mftctl.reporting.report import Report

_MOST_CHARACTERS = 600
"""Longer prompts and answers are cut on the page."""

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def to_page(report: Report, drawings: Mapping[str, Drawing], folder: Path) -> str:
    """Returns the page as HTML.

    Args:
        report: The report to show.
        drawings: The drawn figures by name.
        folder: Folder of the page, which links to run folders are relative to.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_finished
    )
    environment.filters["anchor"] = anchor
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    overviews = [overview_text(overview) for overview in report.overviews]
    overviews += [frontier_text(frontier) for frontier in report.frontiers]
    preferences = [preferences_text(report.preferences)] if report.preferences else []
    efficiency = [efficiency_text(report.efficiency)] if report.efficiency else []
    tables: list[dict[str, Any]] = [
        {
            "text": metric_text(table),
            "seeds": metric_text(table, by_seed=True) if any(len(row.by_seed) > 1 for row in table.rows) else None,
            "flags": flag_lines(table),
        }
        for table in report.tables
    ]
    measured = [part for table in tables for part in (table["text"], table["seeds"]) if part]
    shown = [*overviews, *measured, *preferences, *efficiency]
    return template.render(
        version=__version__,
        report=report,
        headlines=headlines(report.tables),
        overviews=overviews,
        tables=tables,
        preferences=preferences,
        efficiency=efficiency,
        figures=[(figure, Markup(_inline(figure, drawings[figure.name].svg))) for figure in report.figures],
        answers=[_shown_answers(changes) for changes in report.answers if changes.won or changes.lost],
        sources=[(source, _link(source.folder, folder)) for source in report.sources],
        groups=_groups(report, shown),
        note=NOTE,
        preferences_note=PREFERENCES_NOTE,
        efficiency_note=EFFICIENCY_NOTE,
    )


def _shown_answers(changes: AnswerChanges) -> dict[str, Any]:
    """The changed answers for the page: the first ones, cut to a readable length."""
    parts = [(name, answers) for name, answers in (("Won", changes.won), ("Lost", changes.lost)) if answers]
    return {
        "title": changes.title,
        "before": changes.baseline,
        "after": changes.state,
        "parts": [
            (name, len(all_), [_cut_answer(one) for one in all_[:SHOWN_ANSWERS]]) for name, all_ in parts if all_
        ],
    }


def _cut_answer(answer: ChangedAnswer) -> dict[str, str | None]:
    return {
        "id": answer.id,
        **{name: _cut(getattr(answer, name)) for name in ("prompt", "reference", "before", "after")},
    }


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]} … ({len(text) - _MOST_CHARACTERS:,} more characters)"


def _finished(value: Any) -> Any:
    """Renders a value for the page; a drawing is already safe markup."""
    return visible(value) if type(value) is str else value


def anchor(runs: tuple[str, ...]) -> str:
    """The page anchor for the runs of a number: a single run, or a list of several."""
    return f"run-{runs[0]}" if len(runs) == 1 else f"runs-{'-'.join(name.split('-')[0] for name in runs)}"


def _groups(report: Report, tables: list[TextTable]) -> list[tuple[str, ...]]:
    """The groups of runs that a number on the page averages over."""
    found = [cell.runs for table in tables for row in table.rows for cell in row]
    found += [headline.runs for headline in headlines(report.tables)]
    return [runs for runs in dict.fromkeys(found) if len(runs) > 1]


def _inline(figure: Figure, svg: str) -> str:
    """The figure for the page: full width, in the text colour, with an accessible name."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    label = html.escape(visible_line(figure.title))
    # Only inside tags: text may name a colour too.
    return re.sub(
        "<[^>]*>", lambda tag: tag[0].replace(INK, "currentColor"), f'{head} role="img" aria-label="{label}">{body}'
    )


def _link(target: Path, folder: Path) -> str:
    return quote(os.path.relpath(target.resolve(), folder.resolve()))
