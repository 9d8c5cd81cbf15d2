"""Commands printed for the user to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from mftctl.text import command_line


@pytest.fixture(autouse=True)
def _no_runs_folder_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFTCTL_RUNS", raising=False)


def test_it_is_quoted_for_the_shell() -> None:
    assert command_line("mftctl", "eval", Path("a b"), runs=Path("other")) == "mftctl eval 'a b' --runs other"


def test_a_dash_before_a_path_makes_no_option_of_it() -> None:
    assert command_line("mftctl", "eval", Path("-x"), runs=Path("-r")) == "mftctl eval ./-x --runs ./-r"


def test_the_default_runs_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line("mftctl", "probe", runs=Path("runs")) == "mftctl probe"
    monkeypatch.setenv("MFTCTL_RUNS", "other")
    assert command_line("mftctl", "probe", runs=Path("other")) == "mftctl probe"
    assert command_line("mftctl", "probe", runs=Path("runs")) == "mftctl probe --runs runs"
