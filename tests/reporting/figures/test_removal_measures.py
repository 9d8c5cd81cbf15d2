from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFormatError
from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.mask_groups import MaskGroup, mask_families
from mftctl.reporting.figures.removal_measures import MAX_MASKS, layer_shares, mask_overlaps
from tests.reporting.mask_runs import damage, make_mask, random_keep, write_mask_run

LAYER = "model.layers.{}."


def groups_of(root: Path) -> tuple[MaskGroup, ...]:
    (family,), problems = mask_families(list_runs(root)[0])
    assert problems == []
    return family.groups


def bits(*removed: int, weights: int = 8) -> torch.Tensor:
    """A tensor of two rows that removes these flat positions."""
    return torch.tensor([place not in removed for place in range(weights)]).reshape(2, -1)


def test_shares_by_projection_and_layer_averaged_over_seeds(tmp_path: Path) -> None:
    q, down = LAYER + "self_attn.q_proj.weight", LAYER + "mlp.down_proj.weight"
    first = {q.format(2): bits(0), down.format(2): bits(0, 1), down.format(4): bits()}
    second = {q.format(2): bits(0, 1, 2), down.format(2): bits(0, 1)}
    write_mask_run(tmp_path, 1, "MFT", make_mask(first), stage="mft", seed=0)
    write_mask_run(tmp_path, 2, "MFT", make_mask(second), stage="mft", seed=1)
    write_mask_run(tmp_path, 3, "L1 mask", make_mask({q.format(3): bits(5)}))
    l1, mft = layer_shares(groups_of(tmp_path))
    assert mft.layers == l1.layers == (2, 3, 4)
    assert mft.projections == l1.projections == ("q", "down")
    assert mft.shares == ((2 / 8, None, None), (2 / 8, None, 0.0))
    assert l1.shares == ((None, 1 / 8, None), (None, None, None))
    assert (mft.label, mft.seeds, mft.runs) == ("MFT", (0, 1), ("001-mask-train", "002-mask-train"))
    assert mft.removed_share == (3 / 24 + 5 / 16) / 2
    assert not mft.covers_all
    assert (mft.is_even, l1.is_even) == (False, True)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (
            [f"self_attn.{part}_proj.weight" for part in "kovq"]
            + [f"mlp.{part}_proj.weight" for part in ("up", "gate")],
            ("q", "k", "v", "o", "gate", "up"),
        ),
        (
            ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
            ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
        ),
        (["mlp.up_proj.weight", "mlp.shared_experts.up_proj.weight"], ("mlp.up", "shared_experts.up")),
        (["mlp.experts.gate_up_proj"], ("gate_up",)),
    ],
)
def test_rows_have_the_shortest_names_that_differ(tmp_path: Path, names: list[str], rows: tuple[str, ...]) -> None:
    write_mask_run(tmp_path, 1, "MFT", make_mask({f"h.0.{name}": bits(1) for name in names}))
    assert layer_shares(groups_of(tmp_path))[0].projections == rows


def test_experts_of_one_layer_count_as_one(tmp_path: Path) -> None:
    name = LAYER.format(0) + "mlp.experts.{}.up_proj.weight"
    keep = {name.format(0): bits(0), name.format(1): bits(0, 1), name.format(10): bits()}
    write_mask_run(tmp_path, 1, "MFT", make_mask(keep))
    (found,) = layer_shares(groups_of(tmp_path))
    assert (found.projections, found.layers, found.shares) == (("up",), (0,), ((3 / 24,),))


def test_tensors_outside_the_layers_and_norms_have_no_cell(tmp_path: Path) -> None:
    keep = {
        "lm_head.weight": bits(0),
        LAYER.format(0) + "input_layernorm.weight": torch.tensor([True, False]),
        LAYER.format(1) + "mlp.up_proj.weight": bits(0),
    }
    write_mask_run(tmp_path, 1, "trivial drop", make_mask(keep, kind="delta"))
    (found,) = layer_shares(groups_of(tmp_path))
    assert (found.projections, found.layers, found.shares) == (("up",), (1,), ((1 / 8,),))


def test_masks_without_a_layer_have_no_map(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", make_mask({"proj.weight": bits(0)}))
    assert layer_shares(groups_of(tmp_path)) == []


REMOVED = st.sets(st.integers(0, 10))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(REMOVED, REMOVED), min_size=2, max_size=4))
def test_jaccard_and_chance_agree_with_plain_sets(masks: list[tuple[set[int], set[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, removed in enumerate(masks):
            tensors = zip("ab", removed, strict=True)
            keep = {name: torch.tensor([place not in out for place in range(11)]) for name, out in tensors}
            write_mask_run(root, seed + 1, "MFT", make_mask(keep), stage="mft", seed=seed)
        found = mask_overlaps(groups_of(root))
    places = [(first, second) for first in range(len(masks)) for second in range(first + 1, len(masks))]
    assert [(pair.first, pair.second) for pair in found.pairs] == places
    for pair in found.pairs:
        a, b = masks[pair.first], masks[pair.second]
        either = sum(len(x | y) for x, y in zip(a, b, strict=True))
        both = sum(len(x & y) for x, y in zip(a, b, strict=True))
        chance = sum(Fraction(len(x) * len(y), 11) for x, y in zip(a, b, strict=True))
        total = sum(map(len, (*a, *b)))
        assert pair.weights == 22
        assert pair.jaccard == (both / either if either else 1)
        assert pair.by_chance == pytest.approx(float(chance / (total - chance)) if total - chance else 1)


def test_only_tensors_covered_by_both_masks_count(tmp_path: Path) -> None:
    shared, own = LAYER.format(4) + "up.weight", LAYER.format(0) + "up.weight"
    write_mask_run(tmp_path, 1, "L1 mask", make_mask({shared: bits(0, 1)}))
    write_mask_run(tmp_path, 2, "MFT", make_mask({shared: bits(1, 2), own: bits(1, 2, 3, 4)}))
    write_mask_run(tmp_path, 3, "masked", make_mask({LAYER.format(7) + "up.weight": bits(1)}))
    found = mask_overlaps(groups_of(tmp_path))
    assert found.labels == ("L1 mask", "MFT", "masked")
    ((pair),) = found.pairs
    assert (pair.first, pair.second, pair.weights, pair.jaccard) == (0, 1, 8, 1 / 3)
    assert pair.by_chance == pytest.approx(0.5 / 3.5)


def test_many_masks_are_chosen_evenly_from_all_states(tmp_path: Path) -> None:
    number = 0
    for state, seeds in (("L1 mask", 1), ("random mask", 10), ("MFT", 5)):
        for seed in range(seeds):
            number += 1
            mask = make_mask(random_keep(number, a=(30,)))
            write_mask_run(tmp_path, number, state, mask, stage=state, seed=seed)
    found = mask_overlaps(groups_of(tmp_path))
    expected = [f"random mask, seed {seed}" for seed in range(6)]
    expected += ["L1 mask", *(f"MFT, seed {seed}" for seed in range(5))]
    assert list(found.labels) == expected
    assert len(found.labels) == len(found.runs) == MAX_MASKS
    assert (len(found.pairs), found.left_out) == (66, 4)


def test_a_mask_file_changed_in_the_meantime_is_an_error(tmp_path: Path) -> None:
    folder = write_mask_run(tmp_path, 1, "MFT", make_mask({"a": bits(1)}))
    groups = groups_of(tmp_path)
    damage(folder / "mask.bits")
    with pytest.raises(MaskFormatError, match="damaged"):
        mask_overlaps(groups)
