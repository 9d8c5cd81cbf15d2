"""Independent parts of the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from mftctl.experiments.fft_options import FftOptions
from mftctl.progress import Silence
from mftctl.training import loop
from mftctl.training.schedule import warmup_steps
from mftctl.workflows.fft import fine_tune
from tests.workflow_fixtures import make_recipe, open_run


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (2, 1), (30, 1), (100, 3), (101, 4)])
def test_warmup_is_rounded_up_but_never_the_whole_training(steps: int, expected: int) -> None:
    assert warmup_steps(steps, FftOptions()) == expected


@pytest.mark.slow
def test_a_checkpoint_is_marked_as_complete_after_all_processes_wrote(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it writes must leave no checkpoint that looks complete."""
    written: list[set[str]] = []

    def meet() -> None:
        checkpoints = tmp_path.rglob("checkpoint-2")
        written.extend({file.name for file in folder.iterdir()} for folder in checkpoints)

    monkeypatch.setattr(loop, "wait_for_all", meet)
    recipe = make_recipe(workspace, fft__max_steps=2, fft__val_steps=2)
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    assert "rng_state.pth" in written[0]
    assert "trainer_state.json" not in written[0]
    assert "trainer_state.json" in written[1]
