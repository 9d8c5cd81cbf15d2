"""Every command that a page of the documentation shows exists, with its options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.running import CommandLine

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in re.findall(r"mftctl ([a-z].*)", block)]


def options(page: Path) -> list[tuple[str, str]]:
    """A command and an option that the text names together, such as `fft --low-memory`."""
    found = re.findall(
        r"`(?:mftctl )?(fft|mask-train|probe|eval|run|validate) ([^`]*--[^`]*)`", page.read_text("utf-8")
    )
    return [(command, option) for command, text in found for option in re.findall(r"--[a-z][a-z-]*", text)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_a_command_is_understood(here: CommandLine, line: str) -> None:
    outcome = here(*re.sub(r"\s+#.*", "", line).split(), "--help")
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(("command", "option"), sorted({pair for page in PAGES for pair in options(page)}))
def test_an_option_is_known(here: CommandLine, command: str, option: str) -> None:
    assert option in here(command, "--help").stdout
