"""The only place that writes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mftctl.cli.streams import PlainTextConsole, unfiltered_messages
from mftctl.errors import ConfigError, MftError
from mftctl.experiments.results import RetainedLosses, Rewards
from mftctl.files.json_files import json_text
from mftctl.progress import Progress as State
from mftctl.runtime.processes import is_first, world_size
from mftctl.text import command_line, visible, visible_line

_TOO_SHORT = ("validating", "measuring retained data", "comparing", "merging", "reporting", "drawing")
"""Tasks too short for one line per tenth."""

_FULL_COLUMNS = 80
"""Results use a narrower layout only if nothing would be cut off."""


class Output:
    """A command's console: live progress on a terminal, occasional lines elsewhere.

    Attributes:
        as_json: Whether to print the result as one JSON document.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._speaks = is_first()
        # Without emoji, so that a name such as `a:key:b` is shown unchanged.
        self._results = PlainTextConsole(soft_wrap=False, quiet=not self._speaks, emoji=False)
        self._messages = PlainTextConsole(stderr=True, file=unfiltered_messages(), quiet=not self._speaks, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._messages,
        )
        self._pinned: RenderableType | None = None
        self._live = Live(get_renderable=self._live_view, console=self._messages, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._told_tenths: dict[str, int] = {}

    def __enter__(self) -> Output:
        if self._messages.is_terminal and self._speaks:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    @property
    def interactive(self) -> bool:
        """True if a user can answer questions."""
        alone = world_size() == 1
        return alone and sys.stdin.isatty() and self._messages.is_terminal and not self.as_json

    @property
    def is_live(self) -> bool:
        """True if a live view can be shown on the terminal that results go to as well."""
        return self._live.is_started and self._results.is_terminal and not self.as_json

    def progress(self, state: State) -> None:
        """Shows the progress of a task."""
        details = "" if state.loss is None else f"loss {state.loss:.4f}"
        if state.tokens_per_second is not None:
            details += f"  {state.tokens_per_second:,.0f} tokens/s"
        if state.records_per_second is not None:
            details += f"{state.records_per_second:,.0f} records/s"
        if not self._messages.is_terminal:
            self._tell_tenths(state, details)
            return
        is_new = state.task not in self._tasks
        if is_new:
            self._tasks[state.task] = self._bars.add_task(state.task, total=state.total, speed="")
        task = self._tasks[state.task]
        self._bars.update(task, completed=state.done, total=state.total, speed=details)
        if is_new and self._live.is_started:
            self._live.refresh()  # even a task shorter than the interval between refreshes is seen
        if state.total is not None and state.done >= state.total:
            self._bars.remove_task(self._tasks.pop(state.task))

    def pin(self, view: RenderableType | None) -> None:
        """Pins a view above the live bars, replacing the previous one; None removes it."""
        self._pinned = view
        if self._live.is_started:
            self._live.refresh()

    def _live_view(self) -> RenderableType:
        return Group(self._pinned, self._bars) if self._pinned is not None else self._bars

    def note(self, text: str) -> None:
        """Prints an informational message."""
        self._messages.print(escape(text), style="dim", highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._messages.print(f"[yellow]Warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def error(self, error: MftError) -> None:
        """Prints a known failure."""
        head, *details = str(error).split("\n")
        self._messages.print(f"[red]Error:[/] {escape(head)}", highlight=False, soft_wrap=True)
        for line in details:
            self._messages.print(escape(line), highlight=False, soft_wrap=True)

    def next_command(self, *words: str | Path, runs: Path | None = None) -> None:
        """Shows what to type next, quoted for the shell.

        Args:
            words: The words of the command line; paths that begin with a dash are kept distinct from options.
            runs: The runs folder for the command; None for a command that uses none.
        """
        text = command_line(*words, runs=runs)
        self._messages.print(f"Next: [bold]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def result(self, document: Mapping[str, Any], *views: RenderableType) -> None:
        """Writes the result to stdout: the document as JSON if requested, otherwise its views."""
        if self.as_json:
            self.text(json_text(document))
            return
        if self._results.width < _FULL_COLUMNS:
            self._results.width = max(self._results.width, *map(self._least_columns, views), 1)
        for view in views:
            self._results.print(view, crop=False)

    def _least_columns(self, view: RenderableType) -> int:
        """Returns the smallest width, up to the full one, that cuts off no word or number of a view."""
        options = self._results.options.update(max_width=_FULL_COLUMNS)
        return Measurement.get(self._results, options, view).minimum

    def text(self, text: str) -> None:
        """Writes text to stdout, with control characters escaped."""
        if self._speaks:
            sys.stdout.write(visible(text))
            sys.stdout.flush()

    def ask(self, question: str, option: str) -> str:
        """Asks a question on the terminal and returns the answer.

        Raises:
            ConfigError: No user can answer; names the option that sets the value.
        """
        if not self.interactive:
            raise ConfigError(f"{question} is missing.", key=option, hint=f"give {option}")
        with self._without_bars():
            try:
                return str(typer.prompt(visible_line(question), err=True))
            except OSError as error:  # the terminal closed during the question
                raise ConfigError(f"{question} is missing.", key=option, hint=f"give {option}") from error

    def confirm_replacing(self, what: str) -> bool:
        """Asks whether to replace an existing result; returns False if no user can answer."""
        if not self.interactive:
            return False
        with self._without_bars():
            try:
                return typer.confirm(f"Replace {visible_line(what)}?", err=True)
            except OSError:  # the terminal closed during the question
                return False

    @contextmanager
    def _without_bars(self) -> Iterator[None]:
        """Stops the live bars, which would overwrite a question."""
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def _tell_tenths(self, state: State, details: str) -> None:
        if state.total is None:
            return
        tenths = 10 * state.done // max(state.total, 1)
        if self._told_tenths.get(state.task) != tenths and state.task not in _TOO_SHORT:
            self._told_tenths[state.task] = tenths
            self.note(f"{state.task} {state.done}/{state.total} {details}".rstrip())


def pairs_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Returns a table of two columns without lines, names on the left and values on the right."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value))
    return table


def reward_rows(rewards: Rewards | None) -> list[tuple[str, str]]:
    """Returns the rows of a result for the rewards of validation records; none unless they are preferences."""
    if rewards is None:
        return []
    return [
        ("reward accuracy", f"{rewards.accuracy:.1%} of the validation records"),
        ("margin", f"{rewards.margin:+.4f} (chosen {rewards.chosen:+.4f}, rejected {rewards.rejected:+.4f})"),
    ]


def retained_rows(losses: RetainedLosses | None, before: str) -> list[tuple[str, str]]:
    """Returns the rows of a result for data of another domain; none without such data.

    Args:
        losses: The losses on it.
        before: When the first of them was measured, such as "at the start".
    """
    if losses is None:
        return []
    return [("retained loss", f"{losses.start_loss:.4f} {before}"), ("", f"{losses.kept_loss:.4f} of what was kept")]
