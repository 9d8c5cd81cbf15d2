"""Checkpoints in the folder of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.experiments.training_folder import TrainingFolder


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    return TrainingFolder(tmp_path, "mftctl fft --resume")


def write_checkpoint(folder: TrainingFolder, step: int, state: str | None) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_latest_complete_checkpoint(folder: TrainingFolder) -> None:
    assert folder.latest_checkpoint() is None
    whole = [write_checkpoint(folder, step, json.dumps({"global_step": step})) for step in (9, 10)]
    write_checkpoint(folder, 11, '{"glob')
    write_checkpoint(folder, 12, None)
    assert folder.latest_checkpoint() == whole[1]


@pytest.mark.parametrize(("first", "left"), [(True, {"checkpoint-9"}), (False, {"checkpoint-9", "checkpoint-10"})])
def test_the_first_process_removes_later_checkpoints(
    folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch, first: bool, left: set[str]
) -> None:
    monkeypatch.setattr("mftctl.experiments.training_folder.is_first", lambda: first)
    for step in (9, 10):
        write_checkpoint(folder, step, "{}")
    folder.remove_checkpoints_after(9)
    assert {path.name for path in folder.checkpoints.iterdir()} == left
