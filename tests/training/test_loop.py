"""Independent parts of the training loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.experiments.training_options import FftOptions
from mftctl.training.loop import latest_checkpoint
from mftctl.training.schedule import warmup_steps


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (2, 1), (30, 1), (100, 3), (101, 4)])
def test_warmup_is_rounded_up_but_never_the_whole_training(steps: int, expected: int) -> None:
    assert warmup_steps(steps, FftOptions()) == expected


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, state in ((9, json.dumps({"global_step": 9})), (10, json.dumps({"global_step": 10})), (11, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
