from __future__ import annotations

import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.quickstart.built_in import model_path
from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures import removal_magnitudes
from mftctl.reporting.figures.mask_groups import mask_families
from mftctl.reporting.figures.removal_magnitudes import BINS, MagnitudeShares, magnitude_shares
from tests.reporting.mask_runs import Tensors, damage, make_mask, random_keep, write_mask_run, write_model


def shares_of(root: Path) -> tuple[list[MagnitudeShares], list[str]]:
    families, problems = mask_families(list_runs(root)[0])
    shares = []
    for family in families:
        found, unmeasured = magnitude_shares(family.groups)
        shares += found
        problems += unmeasured
    return shares, problems


def plain_shares(weights: Tensors, keep: Tensors) -> list[Fraction]:
    """Bins weight by weight: in order of size, each weight counts in the bins that its part of 0 to 1 overlaps."""
    removed = [Fraction(0)] * BINS
    for name, tensor in weights.items():
        values, kept = tensor.flatten().tolist(), keep[name].flatten().tolist()
        order = sorted(range(len(values)), key=lambda place: (abs(values[place]), place))
        for rank, place in enumerate(order):
            if kept[place]:
                continue
            low, high = Fraction(rank * BINS, len(order)), Fraction((rank + 1) * BINS, len(order))
            for number in range(BINS):
                part = min(high, Fraction(number + 1)) - max(low, Fraction(number))
                removed[number] += max(part, Fraction(0)) * Fraction(len(order), BINS)
    return [share * BINS / sum(tensor.numel() for tensor in weights.values()) for share in removed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_shares_agree_with_a_count_weight_by_weight(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.a": (7, 9), "h.0.b": (5, 12), "h.1.a": (7, 9)}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    keep = {name: tensor.abs() > 0.4 for name, tensor in weights.items()}
    model = write_model(tmp_path / "001-fft/model", {**weights, "norm": torch.ones(3)}, shards)
    write_mask_run(tmp_path, 2, "MFT", make_mask(keep, weights), model=str(model))
    (found,), problems = shares_of(tmp_path)
    assert problems == []
    assert found.shares == pytest.approx([float(share) for share in plain_shares(weights, keep)])
    assert found.flat == pytest.approx(float(np.mean(found.shares)))
    assert not found.is_sampled


SMALL = st.integers(-3, 3).map(float)


@pytest.mark.slow
@given(st.lists(st.tuples(SMALL, st.booleans()), min_size=1, max_size=70))
def test_any_tensor_including_equal_weights(pairs: list[tuple[float, bool]]) -> None:
    weights = {"h.0.a": torch.tensor([weight for weight, _ in pairs])}
    keep = {"h.0.a": torch.tensor([kept for _, kept in pairs])}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "001-fft/model", weights)
        write_mask_run(Path(folder), 2, "MFT", make_mask(keep, weights), model=str(model))
        (found,), _ = shares_of(Path(folder))
    assert found.shares == pytest.approx([float(share) for share in plain_shares(weights, keep)])


def test_the_smallest_weights_fill_the_first_bins_and_chance_is_flat(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.randn(100, 200, generator=torch.Generator().manual_seed(1)).bfloat16()}
    order = weights["h.0.a"].abs().flatten().argsort(stable=True)
    smallest = torch.ones(20_000, dtype=torch.bool)
    smallest[order[:2000]] = False
    model = write_model(tmp_path / "001-fft/model", weights)
    for number, (state, keep) in enumerate(
        [("L1 mask", smallest.reshape(100, 200)), ("random mask", random_keep(0, 0.1, a=(100, 200))["a"])]
    ):
        write_mask_run(tmp_path, 2 + number, state, make_mask({"h.0.a": keep}, weights), model=str(model))
    (chance, l1), problems = shares_of(tmp_path)
    assert problems == []
    assert l1.shares == (1.0, 1.0, *[0.0] * (BINS - 2))
    assert l1.flat == 0.1
    assert chance.shares == pytest.approx([chance.flat] * BINS, abs=0.04)


def test_seeds_are_averaged_each_with_its_own_model(tmp_path: Path) -> None:
    half = torch.arange(40) < 20
    for seed, keep in enumerate([half, ~half]):
        weights = {"h.0.a": torch.arange(40.0) + seed}
        model = write_model(tmp_path / f"{seed + 1:03d}-fft/model", weights)
        mask = make_mask({"h.0.a": keep}, weights)
        write_mask_run(tmp_path, 3 + seed, "MFT", mask, model=str(model), seed=seed, stage="mft")
    (found,), problems = shares_of(tmp_path)
    assert problems == []
    assert (found.shares, found.lowest, found.highest) == ((0.5,) * BINS, (0.0,) * BINS, (1.0,) * BINS)
    assert (found.label, found.state, found.seeds) == ("MFT", "MFT", (0, 1))


def test_large_tensors_are_sampled_deterministically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"h.0.a": torch.randn(300, 100, generator=torch.Generator().manual_seed(1)), "h.0.b": torch.ones(100)}
    keep = {name: tensor.abs() > 0.5 for name, tensor in weights.items()}
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "MFT", make_mask(keep, weights), model=str(model))
    whole = shares_of(tmp_path)[0][0]
    monkeypatch.setattr(removal_magnitudes, "MAX_SAMPLE", 4096)
    removal_magnitudes._sample.cache_clear()
    sampled = shares_of(tmp_path)[0][0]
    again = shares_of(tmp_path)[0][0]
    removal_magnitudes._sample.cache_clear()
    assert (whole.is_sampled, sampled.is_sampled) == (False, True)
    assert sampled == again
    assert sampled.shares != whole.shares
    assert sampled.shares == pytest.approx(
        whole.shares, abs=0.25
    )  # only in the bin at the border; the others are equal
    assert sampled.flat == whole.flat


@pytest.mark.parametrize(("weights", "most"), [(10, 4), (4, 4), (1000, 7), (7, 100)])
def test_a_sample_has_one_position_per_piece(weights: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal_magnitudes, "MAX_SAMPLE", most)
    removal_magnitudes._sample.cache_clear()
    places = removal_magnitudes._sample(weights).tolist()
    removal_magnitudes._sample.cache_clear()
    count = min(weights, most)
    assert len(places) == count
    assert all(n * weights // count <= place < (n + 1) * weights // count for n, place in enumerate(places))


def test_a_drop_is_measured_on_the_fine_tuned_model(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0)}
    mask = make_mask({"h.0.a": torch.arange(40) >= 4}, weights, kind="delta")
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "trivial drop", mask, model=str(model))
    (found,), problems = shares_of(tmp_path)
    assert problems == []
    assert found.shares[:3] == (1.0, 1.0, 0.0)


def test_a_missing_model_hides_no_other(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0)}
    mask = make_mask({"h.0.a": torch.arange(40) >= 4}, weights)
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "MFT", mask, model=str(model), seed=0, stage="mft")
    write_mask_run(tmp_path, 3, "MFT", mask, model="/gone/009-fft/model", seed=1, stage="mft")
    write_mask_run(tmp_path, 4, "L1 mask", mask, model="no such model")
    (found,), problems = shares_of(tmp_path)
    assert found.runs == ("002-mask-train",)
    assert problems == [
        "004-mask-train: left out of the magnitude figure; its model is not on disk: no such model",
        "003-mask-train: left out of the magnitude figure; its model is not on disk: /gone/009-fft/model",
    ]


def test_other_weights_than_the_masks_are_refused(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0), "h.0.b": torch.arange(30.0)}
    keep = {name: tensor > 3 for name, tensor in weights.items()}
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "MFT", make_mask(keep, weights), model=str(model))
    other = make_mask(keep, {**weights, "h.0.b": torch.arange(30.0) + 1})
    write_mask_run(tmp_path, 3, "L1 mask", other, model=str(model))
    larger = make_mask({**keep, "h.0.c": torch.arange(3) > 1}, {**weights, "h.0.c": torch.ones(3)})
    write_mask_run(tmp_path, 4, "random mask", larger, model=str(model))
    (found,), problems = shares_of(tmp_path)
    assert found.label == "MFT"
    left_out = "left out of the magnitude figure"
    assert problems == [
        f"004-mask-train: {left_out}: The base has no such tensor ({model})",
        f"003-mask-train: {left_out}: The weights are not the ones the mask was made for ({model})",
    ]


def test_a_damaged_model_is_named_for_each_of_its_masks(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0)}
    mask = make_mask({"h.0.a": torch.arange(40) >= 4}, weights)
    model = write_model(tmp_path / "001-fft/model", weights)
    write_mask_run(tmp_path, 2, "MFT", mask, model=str(model))
    write_mask_run(tmp_path, 3, "L1 mask", mask, model=str(model))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-8])
    found, problems = shares_of(tmp_path)
    assert found == []
    assert [problem.split(": ")[0] for problem in problems] == ["003-mask-train", "002-mask-train"]
    assert all("not a complete safetensors file" in problem for problem in problems)


def test_a_mask_damaged_in_the_meantime_hides_no_other(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0)}
    mask = make_mask({"h.0.a": torch.arange(40) >= 4}, weights)
    model = write_model(tmp_path / "001-fft/model", weights)
    first = write_mask_run(tmp_path, 2, "MFT", mask, model=str(model))
    write_mask_run(tmp_path, 3, "L1 mask", mask, model=str(model))
    (family,), problems = mask_families(list_runs(tmp_path)[0])
    assert problems == []
    damage(first / "mask.bits")
    (found,), problems = magnitude_shares(family.groups)
    assert found.label == "L1 mask"
    assert problems[0].startswith("002-mask-train: left out of the magnitude figure: The mask file is damaged")


def test_a_copied_runs_folder_finds_its_own_models(tmp_path: Path) -> None:
    weights = {"h.0.a": torch.arange(40.0)}
    model = write_model(tmp_path / "runs/001-fft/model", weights)
    mask = make_mask({"h.0.a": torch.arange(40) >= 4}, weights)
    write_mask_run(tmp_path / "runs", 2, "MFT", mask, model=str(model))
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    (found,), problems = shares_of(tmp_path / "elsewhere")
    assert problems == []
    assert found.shares[0] == 1.0


def test_the_built_in_model_is_known_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    weights = {name: load_file(model_path() / "model.safetensors")[name]}
    keep = {name: weights[name].abs() > weights[name].abs().median()}
    write_mask_run(tmp_path, 1, "MFT", make_mask(keep, weights), model="quickstart")
    (found,), problems = shares_of(tmp_path)
    assert problems == []
    assert found.shares[:9] == pytest.approx((1.0,) * 9)
    assert found.shares[11:] == (0.0,) * 9
