"""Ctrl-C on a real process: exit code 130, saved state, and a resumed run equal to an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mftctl.masking.mask import load_mask
from tests.forked_commands.commands import ForkedCommands
from tests.workflow_fixtures import write_additions

OPTIONS = ["--layers", "0-3", "--batch-size", "1", "--val-steps", "15", "--max-steps", "30"]


def mask_train(mftctl: list[str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*mftctl, "mask-train", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ctrl_c_and_resume(workspace: Path, tmp_path: Path, forked_commands: ForkedCommands) -> None:
    data = write_additions(tmp_path / "train.jsonl", 100, seed=5)
    start = ["-m", str(workspace / "tiny"), "-d", str(data), *OPTIONS]
    folders = [tmp_path / "undisturbed", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    python = [sys.executable, "-m", "mftctl"]
    undisturbed, interrupted = (
        mask_train(mftctl, folder, *start)
        for mftctl, folder in zip((forked_commands.mftctl, python), folders, strict=True)
    )
    metrics = folders[1] / "runs" / "001-mask-train" / "metrics.jsonl"
    deadline_seconds = time.monotonic() + 120
    while time.monotonic() < deadline_seconds and not (metrics.exists() and metrics.read_text().count("\n") > 10):
        time.sleep(0.05)
    os.kill(interrupted.pid, signal.SIGINT)
    stdout, stderr = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, stderr
    assert "mftctl mask-train --resume" in stderr
    assert stdout == ""
    assert not (folders[1] / "mask.bits").exists()
    resumed = mask_train(forked_commands.mftctl, folders[1], "--resume")
    assert resumed.wait(timeout=120) == 0, resumed.communicate()[1]
    assert undisturbed.wait(timeout=120) == 0
    first, second = (load_mask(folder / "mask.bits") for folder in folders)
    assert all((first[name] == second[name]).all() for name in first.names())
    for process in (undisturbed, resumed):
        process.communicate()
