"""Live view of running experiments on a terminal, or one line per change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mftctl.cli.output import Output
from mftctl.experiments.probe_results import group_text
from mftctl.experiments.run_record import RunStatus
from mftctl.files.json_files import json_text
from mftctl.reporting.watch import Following, RunProgress
from mftctl.text import counted, visible_line

INTERVAL_SECONDS = 2.0
_NEWEST = 5
_QUIET_SECONDS = 300
"""A run that has written nothing for this long may hang, or be working on a long benchmark."""
_TENTHS = 10
_MARKS = {
    RunStatus.RUNNING: "[cyan]▸[/]",
    RunStatus.FINISHED: "[green]✓[/]",
    RunStatus.INTERRUPTED: "[yellow]↻[/]",
    RunStatus.FAILED: "[red]✗[/]",
    "killed": "[red]✗[/]",
}


def watch(console: Output, root: Path, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
    """Watches the runs in a folder until Ctrl-C, even while none is running.

    Args:
        console: The output; off a terminal one line per change, with `--json` one JSON object per change.
        root: The runs folder, which may not exist yet.
        interval_seconds: Time between updates.
    """
    following = Following(root)
    told: dict[str, tuple[object, ...]] = {}
    quiet = False
    progress: Sequence[RunProgress] = ()
    try:
        while True:
            progress = following.refresh()
            if console.is_live:
                console.pin(view(progress, following.unreadable, root, time.time()))
            else:
                _tell_changes(console, progress, told)
                running = any(item.status == RunStatus.RUNNING for item in progress)
                if not running and not quiet:
                    console.note(f"{_nothing_runs(root)} {_counts(progress, following.unreadable)}")
                quiet = not running
            time.sleep(interval_seconds)
    except KeyboardInterrupt:
        console.pin(None)
        if console.is_live:
            console.result({}, view(progress, following.unreadable, root, time.time(), watching=False))


def view(
    progress: Sequence[RunProgress], unreadable: Sequence[str], root: Path, now: float, *, watching: bool = True
) -> RenderableType:
    """Returns running runs in full, the latest few of the others, and the number of runs of each status.

    Args:
        progress: Progress of all runs.
        unreadable: Names of folders that could not be read.
        root: The runs folder.
        now: Seconds since 1970.
        watching: Whether the view will be updated until Ctrl-C.
    """
    running = [item for item in progress if item.status == RunStatus.RUNNING]
    others = sorted((item for item in progress if item.status != RunStatus.RUNNING), key=lambda item: item.written)
    parts: list[RenderableType] = [Group(*_in_full(item, now)) for item in running]
    if others:
        parts.append(_newest(others[-_NEWEST:]))
    footer = _counts(progress, unreadable)
    if watching:
        footer = f"{footer} {'Press Ctrl-C to stop watching.' if running else _nothing_runs(root)}"
    return Group(*parts, Text(footer, style="dim"))


def _in_full(item: RunProgress, now: float) -> Iterator[RenderableType]:
    part = "" if item.part is None else f", {group_text(item.part)}"
    yield Text.from_markup(f"{_MARKS[item.status]} [bold]{escape(item.run)}[/]{escape(_origin(item) + part)}")
    if item.step is not None:
        line = Table.grid(padding=(0, 2, 0, 0))
        done = f"{item.step:,}" if item.steps is None else f"{item.step:,}/{item.steps:,}"
        bar = () if item.steps is None else (ProgressBar(total=item.steps, completed=item.step, width=24),)
        line.add_row(" ", *bar, done, _times(item))
        yield line
        yield Text(f"    {_numbers(item)}")
    else:
        yield Text(f"    {_times(item)}")
    if now - item.written > _QUIET_SECONDS:
        yield Text(f"    no output for {_duration(now - item.written)}", style="yellow")
    yield Text()


def _newest(items: Sequence[RunProgress]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for item in items:
        best = "" if item.best_validation_loss is None else f"best {item.best_validation_loss:.4f}"
        said = "" if item.status == RunStatus.FINISHED else item.error or item.status
        name = f"{_MARKS[item.status]} {escape(item.run)}"
        table.add_row(name, escape(_origin(item).strip()), best, _duration(item.seconds), escape(said))
    return table


def _counts(progress: Sequence[RunProgress], unreadable: Sequence[str]) -> str:
    found = Counter[str](item.status for item in progress)
    if unreadable:
        found["unreadable"] = len(unreadable)
    runs = len(progress) + len(unreadable)
    told = ", ".join(f"{count:,} {name}" for name, count in found.items())
    return f"{counted(runs, 'run')}: {told}." if runs else "No runs."


def _nothing_runs(root: Path) -> str:
    return f"No runs in progress in {root}; waiting for the next run until Ctrl-C."


def _tell_changes(console: Output, progress: Sequence[RunProgress], told: dict[str, tuple[object, ...]]) -> None:
    """Prints one line per active run at its start, its end, each validation and each tenth of its steps."""
    first = not told
    for item in progress:
        tenth = None if not item.steps or item.step is None else _TENTHS * item.step // item.steps
        state = (item.status, item.part, tenth, item.validation_loss, item.best_validation_loss)
        if told.get(item.run) != state and (item.status == RunStatus.RUNNING or not first):
            console.text(json_text(asdict(item), indent=None) if console.as_json else f"{visible_line(_line(item))}\n")
        told[item.run] = state


def _line(item: RunProgress) -> str:
    parts = [item.status if item.part is None else f"{item.status}, {group_text(item.part)}"]
    if item.step is not None:
        parts.append(f"step {item.step:,}" if item.steps is None else f"step {item.step:,}/{item.steps:,}")
    parts += [part for part in (_numbers(item), _times(item), item.error or "") if part]
    return f"{item.run}{_origin(item)}: {', '.join(parts)}"


def _origin(item: RunProgress) -> str:
    return f" ({'' if item.stage is None else f'{item.stage}, '}seed {item.seed})"


def _numbers(item: RunProgress) -> str:
    parts = []
    if item.train_loss is not None:
        parts.append(f"loss {item.train_loss:.4f}")
    if item.validation_loss is not None:
        parts.append(f"validation {item.validation_loss:.4f}")
    if item.best_validation_loss is not None:
        parts.append(f"best {item.best_validation_loss:.4f}")
    if item.tokens_per_second is not None:
        parts.append(f"{item.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)


def _times(item: RunProgress) -> str:
    if item.status != RunStatus.RUNNING:
        return _duration(item.seconds)
    left = f", about {_duration(item.seconds_left)} left" if item.seconds_left else ""
    return f"{_duration(item.seconds)} so far{left}"


def _duration(seconds: float) -> str:
    """`45 s`, `12:05` (minutes and seconds) or `1:02:03`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
