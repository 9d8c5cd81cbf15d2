"""The report's files: a page and Markdown to read, JSON and CSV to compute with, LaTeX and figures to publish."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftctl.atomic import atomic_file, write_text
from mftctl.progress import Listener, Progress
from mftctl.regular_files import read_regular
from mftctl.reporting.drawing import Drawing, render
from mftctl.reporting.headlines import headlines
from mftctl.reporting.markdown import to_markdown
from mftctl.reporting.page import to_page
from mftctl.reporting.table_files import write_tables

if TYPE_CHECKING:
    from mftctl.reporting.report import Report


def write_report(report: Report, folder: Path, listener: Listener) -> list[Path]:
    """The files written, `index.html` first; those of an earlier report are replaced, or removed if now without data.

    Args:
        report: What it tells.
        folder: Made where it is missing; files in it that no report wrote stay.
        listener: Hears progress.
    """
    document = folder / "report.json"
    before = _listed(document)
    page, markdown = folder / "index.html", folder / "report.md"
    drawings = {}
    for done, figure in enumerate(report.figures):
        listener.progress(Progress("drawing", done, len(report.figures)))
        drawings[figure.name] = render(figure)
    listener.progress(Progress("drawing", len(drawings), len(drawings)))
    write_text(page, to_page(report, drawings, folder))
    write_text(markdown, to_markdown(report))
    files = [page, markdown, document, *write_tables(report, folder / "tables")]
    for name, drawing in drawings.items():
        files += _write_drawing(drawing, folder / "figures" / name)
    names = [file.relative_to(folder).as_posix() for file in files]
    write_text(document, json.dumps({**to_document(report), "files": names}, indent=2) + "\n")
    for name in before - set(names):
        (folder / name).unlink(missing_ok=True)
    return files


def _write_drawing(drawing: Drawing, path: Path) -> tuple[Path, Path]:
    svg, png = path.with_name(f"{path.name}.svg"), path.with_name(f"{path.name}.png")
    write_text(svg, drawing.svg)
    with atomic_file(png) as temporary:
        temporary.write_bytes(drawing.png)
    return svg, png


def to_document(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "runs": str(report.root),
        "headlines": [asdict(item) for item in headlines(report.tables)],
        "next": asdict(report.advice),
        "overviews": [asdict(overview) for overview in report.overviews],
        "tables": [asdict(table) for table in report.tables],
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
        "sources": [{**asdict(source), "folder": str(source.folder)} for source in report.sources],
        "unfinished": list(report.unfinished),
        "problems": list(report.problems),
    }


def _listed(document: Path) -> set[str]:
    """The files that an earlier report in this folder wrote, as far as its `report.json` tells."""
    names: Iterable[Any] = ()
    with suppress(OSError, ValueError, AttributeError, TypeError):
        names = list(json.loads(read_regular(document)).get("files", []))
    ours = (("figures", ".svg"), ("figures", ".png"), ("tables", ".tex"), ("tables", ".csv"))
    return {
        name
        for name in names
        if isinstance(name, str) and len(Path(name).parts) == 2 and (Path(name).parts[0], Path(name).suffix) in ours
    }
