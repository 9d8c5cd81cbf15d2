"""Command lines in a separate folder per test, and in one shared by all tests of a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine


@pytest.fixture
def mftctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by the tests of a module, for commands that build on each other."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """A command line in the module's folder."""
    return CommandLine(folder, monkeypatch, capsys)
