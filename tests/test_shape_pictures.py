"""`scripts/shape_pictures.py`: the same pictures each time, which show what their records say, and a usable model."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

from mftctl.masking.mask import load_mask
from mftctl.progress import Silence
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import make_recipe, open_run

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("shape_pictures")
    monkeypatch.setattr(module, "COUNTS", {"pretraining": 6, "train": 4, "validation": 2, "test": 2})
    return module


def built(pictures: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["shape_pictures.py", str(folder)])
    pictures.main()
    return folder


def test_the_files_are_the_same_each_time(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (built(pictures, tmp_path / name, monkeypatch) for name in ("first", "second"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".png"]) == 14
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    record = json.loads((first / "train.jsonl").read_text().splitlines()[0])
    assert record["prompt"] == "Describe the picture."
    assert (first / record["images"][0]).is_file()


def test_shapes_are_drawn_in_their_colour_at_their_place(pictures: ModuleType) -> None:
    rng = random.Random(0)
    for place in range(4):
        for kind in pictures.SHAPES:
            picture = pictures.drawn([pictures.Shape("red", kind, place)], rng)
            red = [(x, y) for x in range(32) for y in range(32) if picture.getpixel((x, y)) == pictures.COLOURS["red"]]
            assert red
            assert {(x // 16, y // 16) for x, y in red} == {(place % 2, place // 2)}


def test_descriptions_name_the_shapes_from_the_last_to_the_first(pictures: ModuleType) -> None:
    shapes = [pictures.Shape("red", "circle", 0), pictures.Shape("blue", "bar", 3)]
    assert pictures.names(shapes)[1] == "a red circle, a blue bar"
    assert pictures.description(shapes)[1] == "a blue bar bottom right, a red circle top left"


@pytest.mark.slow
def test_a_mask_is_learned_from_them(pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built(pictures, tmp_path, monkeypatch)
    recipe = make_recipe(
        folder,
        model=str(folder / "untrained"),
        val_data=[str(folder / "validation.jsonl")],
        mask_train__layers="all",
        mask_train__target="all",
        mask_train__max_steps=1,
    )
    run, source = open_run(folder / "runs", "mask-train", recipe)
    mask_train(recipe, source, run, Silence())
    masked = load_mask(run.folder / "mask.bits").names()
    assert len(masked) == 4 * 7 + 2
    assert not any("vision" in name for name in masked)
