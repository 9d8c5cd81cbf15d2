"""One program: its two processes, what they may not do for long, and what the judge reports."""

from __future__ import annotations

import os
import selectors
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox.limits import Limits
from mftctl.evaluation.sandbox.processes import SandboxedProcess
from mftctl.evaluation.sandbox.programs import Outcome, Program, Verdict
from mftctl.evaluation.sandbox.sandboxes import Sandbox
from mftctl.evaluation.sandbox.working_folders import used_bytes
from mftctl.temporary import CONTENT, SANDBOX_PREFIX, temporary_folder

DETAIL_CHARACTERS = 500
_TICK_SECONDS = 0.2  # how often the clock and the working folders are looked at
_END_SECONDS = 1.0  # for a process that closed its pipes to come to its end
_REPORT_BYTES = 65536


def judge_program(sandbox: Sandbox, program: Program, limits: Limits, stopped: threading.Event) -> Verdict:
    """The verdict on one program.

    Args:
        sandbox: Where it runs.
        program: What to judge.
        limits: What it may use.
        stopped: Set to end it early.

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
    """Foreign text that can do nothing to a terminal, cut to what a report holds."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * DETAIL_CHARACTERS])
    return " ".join(plain.split())[:DETAIL_CHARACTERS]


@contextmanager
def _working_folder() -> Iterator[Path]:
    with temporary_folder(Path(tempfile.gettempdir()), prefix=SANDBOX_PREFIX) as folder:
        (folder / CONTENT).mkdir()
        yield (folder / CONTENT).resolve()


class _Pipes(ExitStack):
    """Pipes whose ends are closed here once, at the latest when this ends."""

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        for fd in ends:
            self.callback(os.close, fd)
        return ends


@contextmanager
def _started(sandbox: Sandbox, program: Program, limits: Limits, folder: Path) -> Iterator[_Trial]:
    """Both processes, killed at the end; the ends of their pipes are theirs alone, but for the report's."""
    with ExitStack() as running:
        report_read, report_write = os.pipe()
        running.callback(os.close, report_read)
        with _Pipes() as pipes:
            pipes.callback(os.close, report_write)
            asked_read, asked_write = pipes.pipe()
            told_read, told_write = pipes.pipe()
            processes: list[SandboxedProcess] = []
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
                }
                process = SandboxedProcess(sandbox.command(limits), order, fds)
                running.callback(process.kill)
                processes.append(process)
        yield _Trial(processes[0], processes[1], report_read, folder)


class _Trial:
    """A program being judged."""

    def __init__(self, candidate: SandboxedProcess, judge: SandboxedProcess, report_fd: int, folder: Path) -> None:
        self._candidate = candidate
        self._judge = judge
        self._report_fd = report_fd
        self._folder = folder
        self._report = b""

    def watch(self, limits: Limits, deadline: float, stopped: threading.Event) -> tuple[Outcome, str]:
        """Waits for the report, no longer than is allowed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._report_fd, selectors.EVENT_READ)
            for process in (self._candidate, self._judge):
                selector.register(process.output_fd, selectors.EVENT_READ, process)
            folder_due = time.monotonic() + _TICK_SECONDS
            while self._report_fd in selector.get_map():
                if stopped.is_set():
                    raise SandboxError("The programs were stopped before they were judged.")
                now = time.monotonic()
                if now >= deadline:
                    return "timed out", f"more than {limits.wall_seconds:g} seconds"
                for key, _ in selector.select(min(_TICK_SECONDS, deadline - now)):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                if self._candidate.output_bytes + self._judge.output_bytes > limits.output_bytes:
                    return "too much output", f"more than {limits.output_bytes} bytes"
                if time.monotonic() >= folder_due:
                    if used_bytes(self._folder, limits.file_bytes) >= limits.file_bytes:
                        return "too much output", f"files of more than {limits.file_bytes} bytes"
                    folder_due = time.monotonic() + _TICK_SECONDS
        return self._reported(limits)

    def _read(self, process: SandboxedProcess | None) -> bool:
        if process is not None:
            return process.read_output()
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
    """How a process came to its end, told from outside."""
    ended = process.how_it_ended(_END_SECONDS)
    if ended is None:
        return "crashed", reason
    status, number = ended
    if not number and status > 128:  # how bubblewrap tells of a signal
        status, number = 0, status - 128
    if number == signal.SIGXCPU:
        return "timed out", f"more than {limits.cpu_seconds} seconds of processor time"
    how = f"signal {number}" if number else f"exit status {status}"
    return "crashed", f"{reason} ({how}) {process.tail.decode('utf-8', 'replace')}"
