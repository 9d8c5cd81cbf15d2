"""`scripts/shape_pictures.py`: the same pictures each time, which show what their records say, and a usable model."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mftctl.data.encoding import encode_all
from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.evaluation.losses import sample_losses
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.targets import find_targets

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
def test_the_model_takes_them_and_can_be_masked(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(pictures, tmp_path, monkeypatch)
    encoder = load_encoder(folder / "untrained", Recipe())
    records = encode_all(list(load_examples([DataSource(str(folder / "train.jsonl"))])), encoder, 128, RecordIssues())
    assert len(records.records) == 4
    model = load_model(folder / "untrained", dtype=torch.float32)
    assert all(math.isfinite(one.nll) for one in sample_losses(model, records.records, pad_token_id=0))
    targets = find_targets(model, range(4), "all")
    assert len(targets) == 4 * 7 + 2
    assert not any("vision" in target.name for target in targets)
