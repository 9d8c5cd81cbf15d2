"""A training leaves nothing in memory once its mask is found, since a GPU cannot hold both."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mftctl.experiments.mask_results import Confirmation
from mftctl.progress import Silence
from mftctl.training.held_out import confirm
from mftctl.training.learn_mask import find_mask
from mftctl.training.mask_search import FoundMask, MaskSearch
from mftctl.training.score_trainer import ScoreTrainer
from mftctl.workflows import mask_train as mask_training
from mftctl.workflows import probe as probing
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import make_recipe, open_run


class Alive:
    """Weak references to objects that trainings should release.

    Attributes:
        trainings: Number of optimizers created.
    """

    def __init__(self) -> None:
        self.trainings = 0
        self._held: list[tuple[str, weakref.ref[Any]]] = []

    def watch(self, trainer: ScoreTrainer, optimizer: Any) -> None:
        self.trainings += 1
        self._held += [("trainer", weakref.ref(trainer)), ("optimizer", weakref.ref(optimizer))]
        for name, module in trainer.masked().items():
            self._held += [(f"{name} (module)", weakref.ref(module)), (f"{name} (scores)", weakref.ref(module.scores))]

    def names(self) -> list[str]:
        return [name for name, reference in self._held if reference() is not None]


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Alive]:
    """Objects of a test's trainings that are still alive, with automatic garbage collection off."""
    watched = Alive()
    create = ScoreTrainer.create_optimizer

    def watch(self: ScoreTrainer, model: Any = None) -> Any:
        is_new = self.optimizer is None
        optimizer = create(self, model)
        if is_new:
            watched.watch(self, optimizer)
        return optimizer

    monkeypatch.setattr(ScoreTrainer, "create_optimizer", watch)
    gc.disable()
    yield watched
    gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_when_a_mask_is_confirmed(
    workspace: Path, tmp_path: Path, alive: Alive, monkeypatch: pytest.MonkeyPatch, low_memory: bool
) -> None:
    found: list[list[str]] = []

    def look(*args: Any) -> Confirmation:
        found.append(alive.names())
        return confirm(*args)

    monkeypatch.setattr(mask_training, "confirm", look)
    changes = {"mask_train__learning_rate": 3e-3, "mask_train__preset": "default", "mask_train__layers": "all"}
    recipe = make_recipe(workspace, **changes, mask_train__low_memory=low_memory)
    run, source = open_run(tmp_path, "mask-train", recipe)
    mask_train(recipe, source, run, Silence())
    assert (found, alive.trainings) == ([[]], 1)


@pytest.mark.slow
def test_between_two_groups_of_a_probe(
    workspace: Path, tmp_path: Path, alive: Alive, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []

    def look(search: MaskSearch) -> FoundMask:
        mask = find_mask(search)
        found.append(alive.names())
        return mask

    monkeypatch.setattr(probing, "find_mask", look)
    recipe = make_recipe(workspace, mask_train__max_steps=2, mask_train__val_steps=1)
    run, source = open_run(tmp_path, "probe", recipe)
    probe(recipe, source, run, Silence())
    assert (found, alive.trainings) == ([[], []], 2)
