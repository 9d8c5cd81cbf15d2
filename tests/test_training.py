"""The parts of the training loop that stand by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.config import FftOptions
from mftctl.training import latest_checkpoint, total_steps, warmup_steps


@pytest.mark.parametrize(
    ("records", "options", "world_size", "expected"),
    [
        (100, {"batch_size": 8}, 1, 13),
        (100, {"batch_size": 8, "epochs": 3}, 1, 39),
        (100, {"batch_size": 8, "epochs": 0.5}, 1, 7),
        (100, {"batch_size": 8, "grad_accum_steps": 4}, 1, 4),
        (100, {"batch_size": 8}, 2, 7),
        (100, {"batch_size": 8, "epochs": 3, "max_steps": 5}, 1, 5),
        (3, {"batch_size": 8}, 1, 1),
    ],
)
def test_total_steps(records: int, options: dict[str, float], world_size: int, expected: int) -> None:
    assert total_steps(records, FftOptions(**options), world_size) == expected


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (2, 1), (30, 1), (100, 3), (101, 4)])
def test_warmup_is_rounded_up_but_never_everything(steps: int, expected: int) -> None:
    assert warmup_steps(steps, FftOptions()) == expected


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, state in ((9, json.dumps({"global_step": 9})), (10, json.dumps({"global_step": 10})), (11, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
