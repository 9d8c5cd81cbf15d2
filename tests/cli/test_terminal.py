"""Interactive use: missing values are prompted for, and progress is live."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.forked_commands.commands import ForkedCommands


def type_into(command: list[str], folder: Path, question: str, answer: str) -> tuple[int, str]:
    """The exit code and all output on a terminal of 100 columns, after one question is answered."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(COLUMNS="100", LINES="30", TERM="xterm-256color")
        os.execv(command[0], command)
    shown, answered = "", False
    deadline_seconds = time.monotonic() + 240
    while time.monotonic() < deadline_seconds:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the program has closed its end
            break
        if question in shown and not answered:
            os.write(terminal, f"{answer}\n".encode())
            answered = True
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.mark.slow
def test_missing_data_is_asked_for_and_progress_is_live(
    workspace: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    command = [*forked_commands.mftctl, "fft", "-m", str(workspace / "tiny"), "--max-steps", "20"]
    code, shown = type_into(command, tmp_path, "Training data", str(workspace / "train.jsonl"))
    assert code == 0, shown
    assert re.search(r"training .* \d+/20 loss \d\.\d+ .* tokens/s", shown)
    assert "Next: mftctl probe" in shown
    assert "\\x1b" not in shown  # control sequences of the bars reach the terminal unescaped


@pytest.mark.slow
def test_a_result_is_replaced_only_after_asking(
    workspace: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    options = ["-m", str(workspace / "tiny"), "-d", str(workspace / "train.jsonl"), "--method", "random"]
    command = [*forked_commands.mftctl, "mask-train", *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    old = (tmp_path / "mask.bits").stat().st_ino
    code, shown = type_into(command, tmp_path, "Replace mask.bits?", "n")
    assert code == 2
    assert "A result already exists" in shown
    assert (tmp_path / "mask.bits").stat().st_ino == old
