"""Judges one program: supervises its two processes and reads the judge's report."""

from __future__ import annotations

import os
import selectors
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox.gatekeeper import Gatekeeper, open_memory, receive_listener
from mftctl.evaluation.sandbox.kinds import Sandbox
from mftctl.evaluation.sandbox.process import SandboxedProcess, used_bytes
from mftctl.evaluation.sandbox.program import Limits, Outcome, Program, Verdict
from mftctl.evaluation.sandbox.visible_paths import VisiblePaths
from mftctl.files.temporary import CONTENT, SANDBOX_PREFIX, temporary_folder

DETAIL_CHARACTERS = 500
_TICK_SECONDS = 0.2  # interval of checks of the clock and the working folders
_END_SECONDS = 1.0  # grace period for a process that has closed its pipes
_REPORT_BYTES = 65536


def judge_program(sandbox: Sandbox, program: Program, limits: Limits, stopped: threading.Event) -> Verdict:
    """Judges one program.

    Args:
        sandbox: The sandbox to run it in.
        program: The program.
        limits: Its limits.
        stopped: Set to stop it early.

    Raises:
        SandboxError: Its processes could not be started, or it was stopped.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(_working_folder())
        try:
            trial = stack.enter_context(_started(sandbox, program, limits, folder))
        except OSError as error:
            raise SandboxError(
                "A sandboxed process could not be started.", actual=f"{type(error).__name__}: {error}"
            ) from error
        outcome, detail = trial.watch(limits, start + limits.wall_seconds, stopped)
    seconds = time.monotonic() - start
    return Verdict(outcome == "passed", outcome, printable(detail), seconds)


def printable(text: str) -> str:
    """Untrusted text without control characters, truncated to the length of a report."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * DETAIL_CHARACTERS])
    return " ".join(plain.split())[:DETAIL_CHARACTERS]


@contextmanager
def _working_folder() -> Iterator[Path]:
    with temporary_folder(Path(tempfile.gettempdir()), prefix=SANDBOX_PREFIX) as folder:
        (folder / CONTENT).mkdir()
        yield (folder / CONTENT).resolve()


class _Pipes(ExitStack):
    """Pipes whose ends are closed in this process on exit."""

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        for fd in ends:
            self.callback(os.close, fd)
        return ends


@contextmanager
def _started(sandbox: Sandbox, program: Program, limits: Limits, folder: Path) -> Iterator[_Trial]:
    """Starts both processes and kills them on exit; this process keeps only the read end of the report pipe."""
    with ExitStack() as running:
        report_read, report_write = os.pipe()
        running.callback(os.close, report_read)
        with _Pipes() as pipes:
            pipes.callback(os.close, report_write)
            asked_read, asked_write = pipes.pipe()
            told_read, told_write = pipes.pipe()
            processes: list[SandboxedProcess] = []
            views: list[VisiblePaths | None] = []
            for role, source, fds in (
                ("candidate", program.code, (asked_read, told_write)),
                ("judge", program.test, (told_read, asked_write, report_write)),
            ):
                own = folder / role
                own.mkdir()
                order: dict[str, Any] = {
                    **sandbox.order(own),
                    "role": role,
                    "source": source,
                    "entry_point": program.entry_point,
                    "limits": asdict(limits),
                    # The test comes from the benchmark and is trusted; importing numpy takes a thousand look-ups.
                    "asks_for_paths": sandbox.kind == "landlock" and role == "candidate",
                }
                process = SandboxedProcess(sandbox.command(limits), order, fds)
                running.callback(process.kill)
                processes.append(process)
                views.append(_view(order))
        polled = None if sandbox.kind != "none" else folder
        yield _Trial(processes[0], processes[1], report_read, views, polled)


def _view(order: dict[str, Any]) -> VisiblePaths | None:
    """The paths that a process may look up, if they are checked."""
    return VisiblePaths(**order["landlock"], working_folder=order["folder"]) if order["asks_for_paths"] else None


class _Trial:
    """A program being judged.

    Args:
        candidate: Process that runs the program.
        judge: Process that runs the test.
        report_fd: Read end of the judge's report pipe.
        views: The paths that each process may look up; None if they are not checked.
        polled: The working folder, if nothing else limits its size.
    """

    def __init__(
        self,
        candidate: SandboxedProcess,
        judge: SandboxedProcess,
        report_fd: int,
        views: Sequence[VisiblePaths | None],
        polled: Path | None,
    ) -> None:
        self._candidate = candidate
        self._judge = judge
        self._report_fd = report_fd
        self._views = views
        self._polled = polled
        self._poll_due = time.monotonic() + _TICK_SECONDS
        self._report = b""
        self._gatekeepers: list[Gatekeeper] = []

    def watch(self, limits: Limits, deadline: float, stopped: threading.Event) -> tuple[Outcome, str]:
        """Waits for the report, up to the time limit, and answers the processes' system calls meanwhile."""
        with ExitStack() as listeners, selectors.DefaultSelector() as selector:
            selector.register(self._report_fd, selectors.EVENT_READ, self._read_report)
            for process, view in zip((self._candidate, self._judge), self._views, strict=True):
                selector.register(process.output_fd, selectors.EVENT_READ, process.read_output)
                opens = partial(self._open_gate, process, view, limits, selector, listeners)
                selector.register(process.gate, selectors.EVENT_READ, opens)
            while self._report_fd in selector.get_map():
                if stopped.is_set():
                    raise SandboxError("The programs were stopped before they were judged.")
                now = time.monotonic()
                if now >= deadline:
                    return "timed out", f"more than {limits.wall_seconds:g} seconds"
                for key, _ in selector.select(min(_TICK_SECONDS, deadline - now)):
                    if not key.data():
                        selector.unregister(key.fileobj)
                too_much = self._too_much(limits)
                if too_much is not None:
                    return "too much output", too_much
        return self._reported(limits)

    def _too_much(self, limits: Limits) -> str | None:
        """The output or file limit that is exceeded, if any."""
        if self._candidate.output_bytes + self._judge.output_bytes > limits.output_bytes:
            return f"more than {limits.output_bytes} bytes"
        if any(gatekeeper.too_much_made for gatekeeper in self._gatekeepers):
            return f"more than {limits.files} files and folders made"
        if self._polled is not None and time.monotonic() >= self._poll_due:
            self._poll_due = time.monotonic() + _TICK_SECONDS
            if used_bytes(self._polled, limits.folder_bytes) >= limits.folder_bytes:
                return f"files of more than {limits.folder_bytes} bytes"
        return None

    def _open_gate(
        self,
        process: SandboxedProcess,
        view: VisiblePaths | None,
        limits: Limits,
        selector: selectors.BaseSelector,
        listeners: ExitStack,
    ) -> bool:
        """Starts answering a process's system calls; always False, because its listener arrives only once."""
        listener = receive_listener(process.gate)
        if listener is not None:
            listeners.callback(os.close, listener)
            memory = -1 if view is None else open_memory(process.pid)
            if memory >= 0:
                listeners.callback(os.close, memory)
            gatekeeper = Gatekeeper(listener, process.pid, memory, limits.files, view)
            self._gatekeepers.append(gatekeeper)
            selector.register(listener, selectors.EVENT_READ, gatekeeper.answer)
        return False

    def _read_report(self) -> bool:
        piece = os.read(self._report_fd, _REPORT_BYTES)
        self._report += piece
        return bool(piece) and len(self._report) <= _REPORT_BYTES

    def _reported(self, limits: Limits) -> tuple[Outcome, str]:
        outcome, _, detail = self._report.decode("utf-8", "replace").partition("\n")
        match outcome:
            case "passed" | "failed" | "out of memory":
                return outcome, detail
            case "crashed":
                return _death(self._candidate, limits, detail)
        return _death(self._judge, limits, "the judge ended without a report")


def _death(process: SandboxedProcess, limits: Limits, reason: str) -> tuple[Outcome, str]:
    """The outcome of a process that ended, determined from outside."""
    ended = process.how_it_ended(_END_SECONDS)
    if ended is None:
        return "crashed", reason
    status, number = ended
    if not number and status > 128:  # bubblewrap reports a signal this way
        status, number = 0, status - 128
    if number == signal.SIGXCPU:
        return "timed out", f"more than {limits.cpu_seconds} seconds of processor time"
    how = f"signal {number}" if number else f"exit status {status}"
    return "crashed", f"{reason} ({how}) {process.tail.decode('utf-8', 'replace')}"
