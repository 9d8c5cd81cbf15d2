"""Writes the report: HTML and Markdown for reading, JSON and CSV for analysis, LaTeX and figures for publication."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftctl.errors import OutputError
from mftctl.files.json_files import json_text
from mftctl.files.ownership import Kind, require_free, write_listed
from mftctl.progress import Listener, Progress
from mftctl.reporting.figures.style import render
from mftctl.reporting.output.headlines import headlines
from mftctl.reporting.output.markdown import to_markdown
from mftctl.reporting.output.page import to_page
from mftctl.reporting.output.table_files import answer_files, table_files

if TYPE_CHECKING:
    from mftctl.reporting.report import Report
    from mftctl.reporting.state_tables import MetricTable

_ALWAYS = ("index.html", "report.md", "report.json")
_FOLDERS = ("tables", "answers", "figures")


def write_report(report: Report, folder: Path, listener: Listener) -> list[Path]:
    """Writes the report's files and returns their paths, `index.html` first.

    Files of an earlier report are replaced, or removed if there is no data for them any more.

    Args:
        report: The report to write.
        folder: Created if missing; files that were not written by a report are kept.
        listener: Receives progress updates.

    Raises:
        OutputError: A user's file is in the way; nothing was written.
    """
    drawings = {}
    for done, figure in enumerate(report.figures):
        listener.progress(Progress("drawing", done, len(report.figures)))
        drawings[figure.name] = render(figure)
    listener.progress(Progress("drawing", len(drawings), len(drawings)))
    contents = {"index.html": to_page(report, drawings, folder).encode(), "report.md": to_markdown(report).encode()}
    contents["report.json"] = b""
    contents |= {f"tables/{name}": text.encode() for name, text in table_files(report).items()}
    contents |= {f"answers/{name}": text.encode() for name, text in answer_files(report).items()}
    for name, drawing in drawings.items():
        contents |= {f"figures/{name}.svg": drawing.svg.encode(), f"figures/{name}.png": drawing.png}
    document = {**to_document(report), "files": list(contents)}
    contents["report.json"] = json_text(document).encode()
    write_listed(folder, contents, Kind.REPORT)
    return [folder / name for name in contents]


def require_report_folder(folder: Path) -> None:
    """Checks that a report can be written to a folder.

    Raises:
        OutputError: The path is a file, or a user's file is in the way.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(
            "The report needs a folder, but this path is a file.",
            path=folder,
            expected="a folder",
            hint="another --output",
        )
    require_free(folder, list(_ALWAYS), Kind.REPORT, folders=_FOLDERS)


def _table_document(table: MetricTable) -> dict[str, Any]:
    """A table as plain data, with the names of its states alone."""
    document = asdict(table)
    for row in document["rows"]:
        del row["made"]
    return document


def to_document(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "runs": str(report.root),
        "headlines": [asdict(item) for item in headlines(report.tables)],
        "next": asdict(report.advice),
        "overviews": [asdict(overview) for overview in report.overviews],
        "tables": [_table_document(table) for table in report.tables],
        "preferences": [asdict(row) for row in report.preferences],
        "efficiency": [asdict(item) for item in report.efficiency],
        "figures": [
            {
                "name": figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "data": [dict(point) for point in figure.data],
                "runs": list(figure.runs),
            }
            for figure in report.figures
        ],
        "answers": [
            {
                "dataset": changes.dataset,
                "metric": changes.metric,
                "baseline": changes.baseline,
                "state": changes.state,
                "seed": changes.seed,
                "samples": changes.samples,
                "won": len(changes.won),
                "lost": len(changes.lost),
                "runs": list(changes.runs),
            }
            for changes in report.answers
        ],
        "sources": [{**asdict(source), "folder": str(source.folder)} for source in report.sources],
        "unfinished": list(report.unfinished),
        "problems": list(report.problems),
    }
