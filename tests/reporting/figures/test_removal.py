from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.removal import removal_figures
from mftctl.reporting.figures.style import Figure, render
from tests.reporting.mask_runs import damage, make_mask, random_keep, write_mask_run, write_model

UP, Q = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.self_attn.q_proj.weight"


def figures_of(root: Path) -> tuple[dict[str, Figure], list[str]]:
    figures, problems = removal_figures(list_runs(root)[0])
    return {figure.name: figure for figure in figures}, problems


def write_experiment(root: Path, layers: int = 3, kind: str = "weight") -> None:
    """Writes two seeds of a random mask and of one that removes the smallest weights of the first layers."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name.format(layer): torch.randn(8, 16, generator=generator) for layer in range(layers) for name in (Q, UP)
        }
        model = write_model(root / f"{10 * seed + 1:03d}-fft/model", weights)
        small = {name: tensor.abs() > 0.1 * index for index, (name, tensor) in enumerate(weights.items())}
        chance = random_keep(seed, **{name.replace(".", "__"): (8, 16) for name in weights})
        for offset, (state, keep) in enumerate({"random mask": chance, "MFT": small}.items()):
            mask = make_mask(keep, weights, kind=kind)
            write_mask_run(root, 10 * seed + 2 + offset, state, mask, seed=seed, stage=state, model=str(model))


def test_the_three_figures_of_an_experiment(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    figures, problems = figures_of(tmp_path)
    assert problems == []
    assert {name: figure.title for name, figure in figures.items()} == {
        "removed-by-layer": "Weights removed by masks, by layer",
        "removed-by-magnitude": "Weights removed by masks, by magnitude",
        "mask-overlap": "Overlap between masks",
    }
    runs = ("002-mask-train", "003-mask-train", "012-mask-train", "013-mask-train")
    assert all(sorted(figure.runs) == list(runs) for figure in figures.values())
    assert all("From 4 masks." in figure.caption for figure in figures.values())
    assert len(figures["removed-by-layer"].data) == 2 * 3 * 2
    assert len(figures["removed-by-magnitude"].data) == 2 * 20
    assert len(figures["mask-overlap"].data) == 6
    assert "averaged over seeds (band" in figures["removed-by-magnitude"].caption
    assert "were sampled" not in figures["removed-by-magnitude"].caption
    json.dumps([figure.data for figure in figures.values()])


def test_the_data_of_the_figures(tmp_path: Path) -> None:
    name = UP.format(5)
    weights = {name: torch.arange(40.0).reshape(4, 10), Q.format(5): torch.ones(4, 10)}
    keep = {name: weights[name] >= 4, Q.format(5): weights[name] >= 0}
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "MFT", make_mask(keep, weights), model=str(model), seed=7)
    other = {name: weights[name] >= 2}
    write_mask_run(tmp_path, 3, "L1 mask", make_mask(other, weights), model=str(model), seed=7)
    figures, _ = figures_of(tmp_path)
    shared = {"seeds": [7], "layer": 5}
    assert figures["removed-by-layer"].data == (
        {"mask": "L1 mask", **shared, "projection": "up", "removed_share": 0.05},
        {"mask": "MFT", **shared, "projection": "q", "removed_share": 0.0},
        {"mask": "MFT", **shared, "projection": "up", "removed_share": 0.1},
    )
    assert figures["removed-by-magnitude"].data[0] == {
        "mask": "L1 mask",
        "seeds": [7],
        "from_rank": 0.0,
        "to_rank": 0.05,
        "removed_share": 1.0,
        "lowest": 1.0,
        "highest": 1.0,
        "by_chance": 0.05,
    }
    assert figures["mask-overlap"].data == (
        {
            "first": "L1 mask",
            "first_run": "003-mask-train",
            "second": "MFT",
            "second_run": "002-mask-train",
            "weights": 40,
            "jaccard": 0.5,
            "by_chance": pytest.approx(0.2 / 5.8),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 20])
def test_the_figures_can_be_drawn(tmp_path: Path, layers: int) -> None:
    write_experiment(tmp_path / "runs", layers)
    figures, _ = figures_of(tmp_path / "runs")
    svg = render(figures["removed-by-layer"]).svg
    assert all(text in svg for text in ("random mask, 2 seeds: ", "MFT, 2 seeds: ", ">up<", ">q<"))
    svg = render(figures["mask-overlap"]).svg
    for entry in figures["mask-overlap"].data:
        decimals = 2 if entry["jaccard"] >= 0.1 else 3
        assert f">{entry['jaccard']:.{decimals}f}<".replace(">0.000<", ">0<") in svg
    assert "removed by both / by either" in svg
    assert "share removed" in render(figures["removed-by-magnitude"]).svg


@pytest.mark.slow
def test_masks_that_remove_nothing_can_be_drawn(tmp_path: Path) -> None:
    weights = {UP.format(0): torch.randn(4, 8), UP.format(1): torch.randn(4, 8)}
    model = write_model(tmp_path / "001-fft/model", weights)
    for number, state in enumerate(["MFT", "L1 mask"]):
        # One mask covers one layer only, so there is a map.
        keep = {name: torch.ones(4, 8, dtype=torch.bool) for name in list(weights)[number:]}
        write_mask_run(tmp_path, 2 + number, state, make_mask(keep, weights), model=str(model))
    figures, _ = figures_of(tmp_path)
    assert len(figures) == 3
    assert all(render(figure).svg for figure in figures.values())


def test_no_map_where_the_same_is_removed_everywhere(tmp_path: Path) -> None:
    half = torch.arange(32).reshape(4, 8) % 2 == 0
    write_mask_run(
        tmp_path, 1, "random drop", make_mask({UP.format(0): half, UP.format(1): half.flip(1)}, kind="delta")
    )
    assert figures_of(tmp_path)[0] == {}


def test_no_overlap_of_one_mask_or_without_a_common_tensor(tmp_path: Path) -> None:
    for number in range(2):
        mask = make_mask(random_keep(number, **{UP.format(number): (4, 4)}))
        write_mask_run(tmp_path, number + 1, "MFT", mask, seed=number)
    figures, problems = figures_of(tmp_path)
    assert list(figures) == ["removed-by-layer"]
    assert len(problems) == 2
    assert "mask-overlap" not in figures


def test_nothing_without_masks(tmp_path: Path) -> None:
    assert figures_of(tmp_path) == ({}, [])


@pytest.mark.slow
def test_drops_have_separate_figures_and_captions(tmp_path: Path) -> None:
    write_experiment(tmp_path / "drops", kind="delta")
    write_experiment(tmp_path)
    for number, run in enumerate(sorted((tmp_path / "drops").glob("*-mask-train"))):
        run.rename(tmp_path / f"{30 + number:03d}-mask-train")
    figures, problems = figures_of(tmp_path)
    assert problems == []
    assert list(figures)[3:] == ["removed-by-layer-2", "removed-by-magnitude-2", "mask-overlap-2"]
    assert [figure.title for figure in list(figures.values())[3:]] == [
        "Weights reset by masks, by layer",
        "Weights reset by masks, by magnitude",
        "Overlap between delta masks",
    ]
    assert all("values before fine-tuning" in figure.caption for figure in list(figures.values())[3:])
    assert "share reset" in render(figures["removed-by-magnitude-2"]).svg


def test_models_of_other_shapes_are_named(tmp_path: Path) -> None:
    for number, width in enumerate((4, 6)):
        mask = make_mask(random_keep(0, **{UP.format(0): (width, 4), UP.format(1): (width, 4)}))
        write_mask_run(tmp_path, number + 1, "MFT", mask, origin=f"models/of-{width}")
    figures, _ = figures_of(tmp_path)
    titles = ["Weights removed by masks, by layer (of-4)", "Weights removed by masks, by layer (of-6)"]
    assert [figure.title for figure in figures.values()] == titles


def test_omissions_are_reported(tmp_path: Path) -> None:
    number = 0
    for stage in range(10):
        for seed in range(2):
            number += 1
            mask = make_mask(random_keep(number, **{UP.format(0): (4, 8), UP.format(1): (4, 8)}))
            write_mask_run(tmp_path, number, "MFT", mask, stage=str(stage), seed=seed)
    write_mask_run(tmp_path, 30, "MFT", mask, stage="9", seed=1)
    figures, _ = figures_of(tmp_path)
    for name in ("removed-by-layer", "mask-overlap"):
        assert "Older masks with the same settings and seed left out: 1." in figures[name].caption
        assert "Other groups of masks left out (fewer seeds or older): 2." in figures[name].caption
    assert "Masks of further seeds left out: 4." in figures["mask-overlap"].caption


def test_one_damaged_mask_and_one_missing_model_hide_nothing_else(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    damage(tmp_path / "002-mask-train/mask.bits")
    (tmp_path / "011-fft/model/model.safetensors").unlink()
    figures, problems = figures_of(tmp_path)
    assert list(figures) == ["removed-by-layer", "removed-by-magnitude", "mask-overlap"]
    assert figures["removed-by-magnitude"].runs == ("003-mask-train",)
    assert set(figures["mask-overlap"].runs) == {"003-mask-train", "012-mask-train", "013-mask-train"}
    assert len(problems) == 3


@pytest.mark.slow
def test_fifty_masks_of_a_million_weights_take_seconds(tmp_path: Path) -> None:
    weights = {UP.format(layer): torch.randn(512, 512) for layer in range(4)}
    model = write_model(tmp_path / "001-fft/model", weights)
    masks = [
        make_mask(random_keep(seed, 0.1, **{name.replace(".", "__"): (512, 512) for name in weights}), weights)
        for seed in range(4)
    ]
    for number in range(50):
        stage, seed = divmod(number, 5)
        write_mask_run(tmp_path, 2 + number, "MFT", masks[number % 4], model=str(model), stage=str(stage), seed=seed)
    start = time.monotonic()
    figures, problems = figures_of(tmp_path)
    assert time.monotonic() - start < 20  # 3 s on an idle core
    assert problems == []
    assert len(figures) == 3
