"""Tracking of a run: passes on what its trainings log, and its result."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mftctl.errors import Interrupted
from mftctl.experiments.probe_results import group_text
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking.feed import Feed, failed_text
from mftctl.experiments.tracking.libraries import MODULES, WAIT_SECONDS, TrackedRun, open_tracker, project_name
from mftctl.experiments.tracking.names import TrackerName, installed_version, wanted
from mftctl.experiments.tracking.state import TrackerState
from mftctl.experiments.tracking.values import result_values
from mftctl.progress import Listener
from mftctl.runtime.processes import is_first

TakeResult = Callable[[Mapping[str, Any]], None]
"""Takes the result of a run, as stored in its record."""

_SHORT_WAIT_SECONDS = 8.0
"""Time for the last numbers of a run that did not finish; processes that are still there after 10 s are killed."""

_GROUPS = "groups"
"""Folder for the trainings of a probe."""


@contextmanager
def tracked(run: Run, track: Sequence[TrackerName], listener: Listener) -> Iterator[TakeResult]:
    """Context in which what a run logs is sent to its trackers; yields the function to call with its result.

    Only the first process sends. A tracker that is not installed is left out, and one that fails is dropped with a
    warning.

    Args:
        run: An open run.
        track: The recipe key `track`.
        listener: Receives where the run is tracked, and the warnings.
    """
    names = [name for name in wanted(track) if installed_version(name) is not None]
    if not names or not is_first():
        yield lambda result: None
        return
    run.observer = tracking = Tracking(run, names, listener)
    try:
        yield tracking.take_result
    finally:
        run.observer = None
        tracking.close(_status(sys.exc_info()[1]))


def _status(error: BaseException | None) -> RunStatus:
    if error is None:
        return RunStatus.FINISHED
    return RunStatus.INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else RunStatus.FAILED


class Tracking:
    """The trackers of one run; an observer of its trainings.

    They are opened when the training starts, after the data was prepared, which may fork processes.

    Args:
        run: The run.
        names: The trackers, all installed.
        listener: Receives notes and warnings.
    """

    def __init__(self, run: Run, names: Sequence[str], listener: Listener) -> None:
        self._run = run
        self._names = names
        self._listener = listener
        self._feeds: list[Feed] | None = None
        self._figures: dict[str, float] = {}

    def logged(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Sends a line."""
        for feed in self._opened():
            feed.log(self._training(folder), metrics)
        self._tell()

    def rewound(self, folder: Path, kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]) -> None:
        """Lets the trackers go on where a training is resumed."""
        for feed in self._opened():
            feed.rewind(self._training(folder), kept, dropped)

    def take_result(self, result: Mapping[str, Any]) -> None:
        """Takes the result, which is sent at the end."""
        self._figures = result_values(result)

    def close(self, status: RunStatus) -> None:
        """Ends the tracked runs, and waits a limited time for them."""
        if self._feeds is None and status is not RunStatus.FINISHED:
            return  # it ended before it had anything to show
        feeds = self._opened()
        for feed in feeds:
            feed.end(status, self._figures)
        wait_seconds = WAIT_SECONDS if status is RunStatus.FINISHED else _SHORT_WAIT_SECONDS
        end_seconds = time.monotonic() + wait_seconds
        late = [feed.name for feed in feeds if not feed.ended(max(0.0, end_seconds - time.monotonic()))]
        self._tell()
        for name in late:
            self._listener.warn(f"--track {name}: it did not take the last numbers within {wait_seconds:g} s.")

    def _opened(self) -> list[Feed]:
        if self._feeds is None:
            shown = _shown(self._run)
            self._feeds = [feed for name in self._names if (feed := self._open(name, shown)) is not None]
        return self._feeds

    def _open(self, name: str, shown: TrackedRun) -> Feed | None:
        try:
            _import(MODULES[name])
            return Feed(name, TrackerState(self._run.folder, name), partial(open_tracker, name, shown))
        except Exception as error:  # as in a feed: no broken installation may end a training
            self._listener.warn(failed_text(name, error))
            return None

    def _training(self, folder: Path) -> str:
        """Returns the name of one of several trainings; empty for that of the run itself."""
        parts = folder.relative_to(self._run.folder).parts
        if parts and parts[0] == _GROUPS:
            return group_text(parts[-1])
        return "-".join(parts)

    def _tell(self) -> None:
        for feed in self._feeds or ():
            feed.tell(self._listener.note, self._listener.warn)


def _import(module: str) -> None:
    """Imports a module in the main thread, as imports in two threads at once can fail."""
    state = random.getstate()
    try:
        import_module(module)
    finally:
        random.setstate(state)  # which importing trackio changes


def _shown(run: Run) -> TrackedRun:
    """Returns what trackers show: the project is the recipe, and the run is the stage with its seed, or the folder."""
    record = run.record
    stage, seed = record.stage, record.config.get("seed", 0)
    recipe = record.config.get("name") or (Path(record.recipe).stem if record.recipe else "mftctl")
    name = run.name if stage is None else f"{stage} {record.command} seed {seed}"
    return TrackedRun(project_name(recipe), name, record.config, run.folder)
