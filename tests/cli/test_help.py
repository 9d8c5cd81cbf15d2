"""Help as a new user sees it, at 80 columns, against golden files; fast, and without torch.

After an intended change: `MFTCTL_UPDATE_GOLDENS=1 pytest tests/cli/test_help.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mftctl.cli.app import COMMANDS as COMMANDS_LISTED
from mftctl.cli.app import load_command
from tests.cli.running import CommandLine

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = [
    "",
    "fft",
    "probe",
    "mask-train",
    "apply",
    "average",
    "interpolate",
    "delta",
    "delta merge",
    "delta export",
    "delta import",
    "eval",
    "report",
    "run",
    "validate",
    "generate",
    "data",
    "data show",
    "data stats",
    "data fetch",
    "cache",
    "cache clear",
    "mask",
    "mask info",
    "mask diff",
    "mask import",
    "mask export",
    "mask push",
    "env",
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_equals_its_golden(mftctl: CommandLine, command: str) -> None:
    outcome = mftctl(*command.split(), "--help")
    text = "\n".join(line.rstrip() for line in outcome.stdout.splitlines()) + "\n"
    golden = GOLDEN / f"help{'-' if command else ''}{command.replace(' ', '-')}.txt"
    if os.environ.get("MFTCTL_UPDATE_GOLDENS"):
        golden.write_text(text, encoding="utf-8")
    assert outcome.code == 0
    assert text == golden.read_text(encoding="utf-8")


def best_seconds(*arguments: str) -> float:
    """The fastest of five processes, since other tests run at the same time."""
    times_seconds = []
    for _ in range(5):
        start_seconds = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times_seconds.append(time.perf_counter() - start_seconds)
    return min(times_seconds)


@pytest.mark.slow
def test_help_takes_at_most_half_a_second() -> None:
    """On a machine so busy that importing typer alone is slow, up to twice that import time is allowed."""
    typer_seconds = best_seconds("-c", "import typer.rich_utils")
    assert best_seconds("-m", "mftctl", "--help") <= max(0.5, 2 * typer_seconds)


@pytest.mark.parametrize("name", COMMANDS_LISTED)
def test_the_list_of_commands_matches_their_own_help(name: str) -> None:
    assert load_command(name).help.split("\n")[0] == COMMANDS_LISTED[name].summary


def test_version(mftctl: CommandLine) -> None:
    import mftctl as package

    assert mftctl("--version").stdout == f"mftctl {package.__version__}\n"


@pytest.mark.slow
def test_completion_is_offered(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "_MFTCTL_COMPLETE": "complete_bash", "COMP_WORDS": "mftctl ma", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("mftctl")
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["mask-train", "mask"]
