"""Signals sent to real processes: which of them end it, and the status recorded in the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import load_run

WORK = """
import pathlib, signal, sys, time
from mftctl.experiments.recording import recorded
from mftctl.experiments.results import Result
from mftctl.experiments.run_folder import create_run
from mftctl.runtime.signals import end_as_on_interrupt
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
end_as_on_interrupt()
run = create_run(pathlib.Path(sys.argv[1]), "eval", {})
with recorded(run):
    print("working", flush=True)
    if sys.argv[2] == "error":
        raise ValueError("unknown")
    time.sleep(60 if sys.argv[2] != "nohup" else 1)
    run.finish(Result())
"""


def work(folder: Path, how: str, number: int | None) -> tuple[int, str]:
    """Exit status and messages of a command that receives a signal while it works."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    if number is not None:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_evaluation_says_how_to_resume(tmp_path: Path, number: int) -> None:
    _, errors = work(tmp_path, "", number)
    assert "mftctl.errors.Interrupted: Stopped." in errors
    assert "the same command with --resume" in errors
    assert load_run(tmp_path / "001-eval").record.status == "interrupted"


@pytest.mark.slow
def test_a_command_under_nohup_continues(tmp_path: Path) -> None:
    assert work(tmp_path, "nohup", signal.SIGHUP) == (0, "")
    assert load_run(tmp_path / "001-eval").record.status == "finished"


@pytest.mark.slow
def test_a_run_that_fails_with_an_unknown_error_records_it(tmp_path: Path) -> None:
    _, errors = work(tmp_path, "error", None)
    assert "ValueError: unknown" in errors
    record = load_run(tmp_path / "001-eval").record
    assert record.status == "interrupted"
    assert record.error is not None
    assert "ValueError" in record.error
