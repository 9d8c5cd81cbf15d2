"""Checkpoints of fine-tuning with weights under other names on disk than in memory: fused experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mftctl.errors import Interrupted
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from tests.conftest import build_tokenizer
from tests.masking.architectures import EXPERTS
from tests.workflow_fixtures import Interrupter, make_recipe, open_run


def build(folder: Path) -> Path:
    torch.manual_seed(0)
    EXPERTS["mixtral"].build().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def same(one: Path, other: Path) -> bool:
    first, second = (dict(load_model(folder, dtype=torch.float32).named_parameters()) for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_kept_model_is_that_of_the_best_step(workspace: Path, tmp_path: Path) -> None:
    """The first step only warms up, and the rate of the others is far too high."""
    model = build(tmp_path / "m")
    recipe = make_recipe(
        workspace, model=str(model), fft__max_steps=3, fft__val_steps=1, fft__learning_rate=1.0, fft__batch_size=2
    )
    run, source = open_run(tmp_path, "fft", recipe)
    assert fine_tune(recipe, source, run, Silence()).best_step == 1
    assert same(model, run.folder / "model")


@pytest.mark.slow
def test_resuming_gives_the_identical_model(workspace: Path, tmp_path: Path) -> None:
    model = build(tmp_path / "m")
    recipe = make_recipe(workspace, model=str(model), fft__max_steps=4, fft__val_steps=2, fft__batch_size=2)
    whole, source = open_run(tmp_path, "fft", recipe)
    fine_tune(recipe, source, whole, Silence())
    run, _ = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(2))
    fine_tune(recipe, source, run, Silence(), resume=True)
    assert same(whole.folder / "model", run.folder / "model")
