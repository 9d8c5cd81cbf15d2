"""`mftctl cache`: clear."""

from __future__ import annotations

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table
from mftctl.data.prepared.cache_folder import OFF, CacheUse, clear_cache
from mftctl.text import counted

cache_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Manage the cache of prepared data.",
)

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@cache_app.callback()
def _cache() -> None:
    """Makes `clear` a command of its own, even though it is the only one."""


@cache_app.command()
def clear(as_json: opt.AsJson = False) -> None:
    """Remove all prepared data; the next command prepares its data again.

    Keeps what another command is preparing.
    """
    removed = clear_cache()
    document = {
        "cache": None if removed.folder is None else str(removed.folder),
        "removed": removed.entries,
        "removed_bytes": removed.size_bytes,
    }
    Output(as_json=as_json).result(document, pairs_table("Cache", [("removed", cache_text(removed))]))


def cache_text(use: CacheUse) -> str:
    """Where the cache lies and what it holds, such as `/home/u/.cache/mftctl/data: 3 data sets, 1.2 GB`."""
    if use.folder is None:
        return OFF
    if use.problem is not None:
        return f"{use.folder}: cannot be read ({use.problem})"
    return f"{use.folder}: {counted(use.entries, 'data set')}, {_size_text(use.size_bytes)}"


def _size_text(size_bytes: int) -> str:
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"
