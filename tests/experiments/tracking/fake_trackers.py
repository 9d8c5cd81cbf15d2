"""Trackers that keep what they receive, or fail, in place of the libraries."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking import names, session
from mftctl.experiments.tracking.libraries import TrackedRun
from mftctl.experiments.tracking.state import TrackerState


class Lines:
    """A listener that keeps notes and warnings, with the threads they came from."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.threads: set[threading.Thread] = set()

    def progress(self, state: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.threads.add(threading.current_thread())

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.threads.add(threading.current_thread())


@dataclass
class FakeTracker:
    """A tracker that keeps everything.

    Attributes:
        run: What it shows of the run.
        known: The identifier of the run that it goes on with; None for a new one.
        fails_at: The step at which it raises an error.
        blocks: Whether it never answers.
    """

    run: TrackedRun
    known: str | None
    place: str = "nowhere"
    fails_at: int | None = None
    blocks: bool = False
    lines: list[tuple[int, dict[str, float], str]] = field(default_factory=list)
    closed: list[tuple[RunStatus, dict[str, float]]] = field(default_factory=list)

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        if self.blocks:
            threading.Event().wait()
        if step == self.fails_at:
            raise ConnectionError("no route to https://me:secret@tracker.example\nand more")
        self.lines.append((step, dict(values), training))

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        self.closed.append((status, dict(figures)))


class FakeLibraries:
    """Replaces the trackers with fakes.

    Attributes:
        opened: All tracked runs by tracker, in the order of opening.
        options: Options of the fakes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, missing: tuple[str, ...] = ()) -> None:
        self.opened: dict[str, list[FakeTracker]] = {}
        self.options: dict[str, object] = {}
        for module in (session, names):
            monkeypatch.setattr(module, "installed_version", lambda name: None if name in missing else "1.0")
        monkeypatch.setattr(session, "import_module", lambda name: SimpleNamespace())
        monkeypatch.setattr(session, "open_tracker", self._open)

    def _open(self, name: str, run: TrackedRun, state: TrackerState) -> FakeTracker:
        fake = FakeTracker(run, state.identifier, **self.options)  # type: ignore[arg-type]
        state.identify(f"{name}-id")
        self.opened.setdefault(name, []).append(fake)
        return fake
