"""Help as a newcomer sees it, at 80 columns, against goldens; fast, and without torch.

After a deliberate change: `MFTCTL_UPDATE_GOLDENS=1 pytest tests/cli/test_help.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import CommandLine

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ["", "fft", "probe", "mask-train", "apply", "eval", "report", "run", "mask", "mask info", "mask diff", "env"]


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
    """The least disturbed of five processes: other tests run beside this one."""
    times_seconds = []
    for _ in range(5):
        start_seconds = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times_seconds.append(time.perf_counter() - start_seconds)
    return min(times_seconds)


def test_help_takes_at_most_half_a_second() -> None:
    """On a machine so busy that even the libraries take long to import, at most three times as long as those."""
    libraries_seconds = best_seconds("-c", "import typer.rich_utils, pydantic, yaml")
    assert best_seconds("-m", "mftctl", "--help") <= max(0.5, 3 * libraries_seconds)


def test_version(mftctl: CommandLine) -> None:
    import mftctl as package

    assert mftctl("--version").stdout == f"mftctl {package.__version__}\n"


def test_completion_is_offered(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "_MFTCTL_COMPLETE": "complete_bash", "COMP_WORDS": "mftctl ma", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("mftctl")
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["mask-train", "mask"]
