"""The three runs that a loss surface goes through, and messages if one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import RunError
from mftctl.experiments.run_folder import Run, create_run
from mftctl.workflows.loss_surface.corners import Corners, find_corners
from tests.partial_results import partial_result


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def progress(self, state: object) -> None:
        """Ignored, since nothing is measured here."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


def add(root: Path, command: str, state: str, source: Run | None = None, **result: Any) -> Run:
    """A finished run with a model, or a mask, made from another run's model."""
    config = {"data": ["train.jsonl"], "test_data": ["test.jsonl"]}
    model = "base" if source is None else source.record.result["model"]
    inputs = {"model": model, "mask": None, "state": "", "parents": [], "origin": "base"}
    run = create_run(root, command, config, inputs=inputs)
    made = run.folder / ("mask.bits" if command == "mask-train" else "model")
    made.mkdir()
    where = {"mask": str(made), "model": model} if command == "mask-train" else {"model": str(made)}
    run.finish(partial_result({"state": state, **where, **result}))
    return run


def add_mask(root: Path, source: Run, change: float, state: str = "MFT") -> Run:
    return add(root, "mask-train", state, source, unmasked_loss=1.0, best_loss=1.0 + change)


def names(corners: Corners) -> list[str]:
    return [run.name for run in corners.runs()]


def test_uses_the_newest_family(tmp_path: Path) -> None:
    for _ in range(2):
        fft = add(tmp_path, "fft", "FFT")
        add(tmp_path, "fft", "continued FFT", fft)
        add_mask(tmp_path, fft, -0.1)
    listener = Notes()
    assert names(find_corners(tmp_path, listener)) == ["004-fft", "005-fft", "006-mask-train"]
    assert listener.notes == ["Surface through 004-fft (FFT), 005-fft (continued FFT), 006-mask-train (MFT)"]


def test_a_newer_fft_without_successors_is_skipped_with_a_note(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    add(tmp_path, "fft", "continued FFT", fft)
    add_mask(tmp_path, fft, -0.1)
    add(tmp_path, "fft", "FFT")
    listener = Notes()
    assert names(find_corners(tmp_path, listener)) == ["001-fft", "002-fft", "003-mask-train"]
    assert listener.notes[0] == "Skipped 004-fft: No continued FFT starts from 004-fft."


def test_the_newest_continued_fft_and_the_mask_that_helps_most(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    for change in (-0.1, -0.3, -0.2):
        add(tmp_path, "fft", "continued FFT", fft)
        add_mask(tmp_path, fft, change)
    add_mask(tmp_path, fft, -0.9, state="random mask")
    assert names(find_corners(tmp_path, Notes())) == ["001-fft", "006-fft", "005-mask-train"]


def test_an_applied_model_replaces_a_missing_mask(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    add(tmp_path, "fft", "continued FFT", fft)
    mask = add_mask(tmp_path, fft, -0.1)
    add(tmp_path, "apply", "MFT", fft)
    assert names(find_corners(tmp_path, Notes()))[2] == "003-mask-train"
    (mask.folder / "mask.bits").rmdir()
    assert names(find_corners(tmp_path, Notes()))[2] == "004-apply"


def test_without_fft_the_existing_runs_are_listed(tmp_path: Path) -> None:
    add(tmp_path, "fft", "LoRA")
    with pytest.raises(RunError) as caught:
        find_corners(tmp_path, Notes())
    assert str(caught.value) == (
        "There is no FFT run for a loss surface.\n"
        f"  where: {tmp_path}\n"
        "  expected: a finished fft run of all weights, with its model in place\n"
        "  got: 001-fft (LoRA)\n"
        "  try: mftctl fft"
    )


def test_without_continued_fft_it_names_the_command(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    add(tmp_path, "fft", "continued LoRA", fft)
    add_mask(tmp_path, fft, -0.1)
    with pytest.raises(RunError) as caught:
        find_corners(tmp_path, Notes())
    assert str(caught.value) == (
        "No continued FFT starts from 001-fft.\n"
        f"  where: {fft.folder}\n"
        "  expected: a finished fft run of all weights that continues from its model, with its own model in place\n"
        "  got: 002-fft (continued LoRA)\n"
        f"  try: mftctl fft --model {fft.folder}/model --keep last"
    )


def test_without_a_learned_mask_it_names_the_command(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    add(tmp_path, "fft", "continued FFT", fft)
    add_mask(tmp_path, fft, -0.1, state="L1 mask")
    with pytest.raises(RunError) as caught:
        find_corners(tmp_path, Notes())
    assert str(caught.value) == (
        "No learned mask for 001-fft was found.\n"
        f"  where: {fft.folder}\n"
        "  expected: a finished mask-train run (method learned) with its mask in place, or its model written by apply\n"
        "  got: 003-mask-train (L1 mask)\n"
        f"  try: mftctl mask-train --model {fft.folder}/model"
    )


def test_test_data_may_come_from_an_evaluation(tmp_path: Path) -> None:
    fft = add(tmp_path, "fft", "FFT")
    add(tmp_path, "fft", "continued FFT", fft)
    add_mask(tmp_path, fft, -0.1)
    fft.update(config={"data": ["train.jsonl"]})
    with pytest.raises(RunError) as caught:
        find_corners(tmp_path, Notes())
    assert str(caught.value) == (
        "No test data is known for 001-fft.\n"
        f"  where: {fft.folder}\n"
        "  expected: test_data in its recipe, or an eval run of its model on a data file\n"
        "  got: neither\n"
        f"  try: mftctl eval {fft.folder}/model --data FILE"
    )
    config = {"test_data": ["asked.jsonl"], "eval": {"max_length_tokens": 77}}
    create_run(tmp_path, "eval", config, inputs={"model": fft.record.result["model"]}).finish(partial_result({}))
    recipe = find_corners(tmp_path, Notes()).recipe
    assert [source.path for source in recipe.test_data] == ["asked.jsonl"]
    assert [source.path for source in recipe.data] == ["train.jsonl"]
    assert recipe.eval.max_length_tokens == 77
