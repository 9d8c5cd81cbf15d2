"""`mask-train --mask soft`, and the commands that take its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.workflow_fixtures import write_additions


@pytest.fixture
def learned(mftctl: CommandLine, workspace: Path) -> CommandLine:
    """A folder with a soft mask of `tiny`, and with records."""
    write_additions(mftctl.folder / "test.jsonl", 6, seed=3)
    options = ["--mask", "soft", "--max-multiplier", "2", "--layers", "1-2", "--max-steps", "8", "--val-steps", "4"]
    data = [
        "-m",
        str(workspace / "tiny"),
        "-d",
        str(workspace / "train.jsonl"),
        "--val-data",
        str(workspace / "val.jsonl"),
    ]
    done = mftctl("mask-train", *data, *options, "--batch-size", "4", "--set", "mask_train.travel=0.5")
    assert done.code == 0, done.stderr
    assert "are not 1" in done.stdout
    return mftctl


@pytest.mark.slow
def test_a_soft_mask_is_shown_applied_measured_refused_and_replaced(learned: CommandLine, workspace: Path) -> None:
    info = json.loads(learned("mask", "info", "mask.bits", "--json").stdout)
    assert (info["kind"], info["tuned"], info["method"]) == ("soft mask", [], "learned")
    shown = learned("mask", "info", "mask.bits").stdout
    assert "Soft mask" in shown
    tiny = str(workspace / "tiny")
    measured = learned("eval", tiny, "--mask", "mask.bits", "-d", "test.jsonl", "--json")
    assert measured.code == 0, measured.stderr
    masked = json.loads(measured.stdout)
    assert masked["state"] == "MFT soft"
    assert learned("apply", tiny, "mask.bits", "-o", "better").code == 0
    applied = json.loads(learned("eval", "better", "-d", "test.jsonl", "--json").stdout)
    assert applied["datasets"][0]["metrics"] == masked["datasets"][0]["metrics"]
    for command, message in (
        (["mask", "diff", "mask.bits", "mask.bits"], "This is a soft mask"),
        (["mask", "export", "mask.bits", "-o", "mask.npz"], "This is a soft mask"),
        (["delta", "merge", "mask.bits", "mask.bits", "-o", "x.delta"], "no fine-tuning to merge"),
    ):
        done = learned(*command)
        assert done.code == 1
        assert message in done.stderr
    again = ["-m", tiny, "-d", str(workspace / "train.jsonl"), "--method", "random", "--layers", "1"]
    refused = learned("mask-train", *again)
    assert refused.code == 2
    assert "mask.bits" in refused.stderr
    assert learned("mask-train", *again, "--yes").code == 0
