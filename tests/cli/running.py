"""Runs the command line within the test process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mftctl.cli.app import main


@dataclass(frozen=True)
class Outcome:
    """The exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


class CommandLine:
    """`mftctl` in its own folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.chdir(self.folder)
        self._monkeypatch.setattr(sys, "argv", ["mftctl", *map(str, arguments)])
        self._capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        captured = self._capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)
