"""Commands in a folder with a FIFO in place of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.reporting.training_folders import write_study

pytestmark = pytest.mark.timeout(60)


@pytest.mark.slow
def test_commands_run_in_spite_of_a_fifo(mftctl: CommandLine) -> None:
    root = mftctl.folder / "runs"
    write_study(root)
    record = sorted(root.iterdir())[0] / "run.json"
    record.unlink()
    os.mkfifo(record)
    outcome = mftctl("report")
    assert outcome.code == 0, outcome.stderr
    assert "run.json: This is not a readable run folder." in " ".join(outcome.stderr.split())


def test_a_mask_that_is_a_fifo(mftctl: CommandLine, tiny_checkpoint: Path) -> None:
    os.mkfifo(mftctl.folder / "mask.bits")
    for arguments in (["info", "mask.bits"], ["import", "mask.bits", "-m", str(tiny_checkpoint), "-o", "x.bits"]):
        outcome = mftctl("mask", *arguments)
        assert outcome.code == 1
        assert "a FIFO instead of a file" in outcome.stderr
