"""Merging, compared with TIES and a sum written from the paper's text, entry by entry in numpy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.errors import ConfigError, MaskingError, MaskMismatchError, OutputError
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.delta.merge import (
    Conflicts,
    MergeMethod,
    MergePlan,
    merge_changes,
    merge_to_checkpoint,
    merge_to_delta,
    open_merge,
    settle_plan,
)
from mftctl.masking.delta.records import NamedModel
from mftctl.masking.delta.values import ValuesKind
from tests.masking.delta.made_deltas import (
    Tensors,
    make,
    moved,
    plan,
    random_tensors,
    raw_checkpoint,
    write_pair,
)


def merged_by_definition(
    base: np.ndarray, results: list[np.ndarray], weights: list[float], method: str, scale: float = 1.0
) -> np.ndarray:
    """The merged weights in fp64, before rounding."""
    found = base.astype(np.float64)
    for place in np.ndindex(base.shape):
        changes = [float(result[place]) - float(base[place]) for result in results]
        weighted = [weight * change for weight, change in zip(weights, changes, strict=True)]
        if method == "sum":
            found[place] += scale * sum(weighted)
            continue
        elected = np.sign(sum(weighted))
        agreeing = [number for number, change in enumerate(changes) if elected and np.sign(change) == elected]
        if agreeing:
            total_weight = sum(weights[number] for number in agreeing)
            found[place] += scale * sum(weighted[number] for number in agreeing) / total_weight
    return found


changes_strategy = st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=20)


@pytest.mark.parametrize("method", ["ties", "sum"])
@settings(deadline=None, max_examples=60)
@given(
    changes=changes_strategy,
    weights=st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=3, max_size=3),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_merging_is_that_of_the_paper(
    method: MergeMethod, changes: list[list[int]], weights: list[float], scale: float
) -> None:
    base = torch.linspace(-1, 1, len(changes), dtype=torch.float64)
    results = [base + torch.tensor([row[side] for row in changes], dtype=torch.float64) / 8 for side in range(3)]
    conflicts = Conflicts()
    plan_of = MergePlan(tuple(weights), method, scale)
    found = merge_changes(base, results, weights, plan_of, conflicts).numpy()
    expected = merged_by_definition(base.numpy(), [one.numpy() for one in results], weights, method, scale)
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    signs = [{np.sign(change) for change in row} - {0} for row in changes]
    assert conflicts.opposed == sum(len(found_signs) == 2 for found_signs in signs)
    assert conflicts.changed == sum(bool(found_signs) for found_signs in signs)


def test_the_example_of_the_paper() -> None:
    """Figure 1: a weak minority is left out of the mean, and a tie of the signs cancels."""
    base = torch.zeros(4)
    results = [torch.tensor(values) for values in ([0.6, 1.0, -0.5, 0.2], [0.4, -0.9, 0.5, 0.0], [-0.3, 0.0, 0.0, 0.0])]
    found = merge_changes(base, results, [1.0] * 3, MergePlan((1.0,) * 3), Conflicts())
    assert torch.allclose(found, torch.tensor([0.5, 1.0, 0.0, 0.2]))


def deltas_of(folder: Path, before: Tensors, sides: list[Tensors], **options: object) -> tuple[Path, list[Path]]:
    """The base, and one delta file per tuned checkpoint."""
    paths = []
    for number, after in enumerate(sides):
        (folder / str(number)).mkdir()
        base, tuned = write_pair(folder / str(number), before, after)
        make(base, tuned, folder / f"{number}.delta", plan(**options))  # type: ignore[arg-type]
        paths.append(folder / f"{number}.delta")
    return base, paths


def merged(
    base: Path, paths: list[Path], folder: Path, method: MergeMethod = "ties", values: ValuesKind = "exact"
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The merged tensors by way of a checkpoint, and by way of a delta file."""
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        merge = open_merge(deltas, base, settle_plan(None, len(paths), method, 1.0))
        merge_to_checkpoint(merge, base, folder / "merged", base_model="org/base")
        merge_to_delta(merge, base, folder / "merged.delta", values, base_model=NamedModel("org/base"))
    with open_delta(folder / "merged.delta") as delta:
        apply_delta_to_checkpoint(base, delta, folder / "applied", base_model="org/base")
    return raw_checkpoint(folder / "merged"), raw_checkpoint(folder / "applied")


@pytest.mark.parametrize("method", ["ties", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_delta_file_gives_the_merged_checkpoint(
    method: MergeMethod, dtype: torch.dtype, tmp_path: Path
) -> None:
    before = random_tensors(dtype)
    sides = [moved(before, seed=seed, size=0.02, share=0.4) for seed in (1, 2, 3)]
    base, paths = deltas_of(tmp_path, before, sides)
    checkpoint, applied = merged(base, paths, tmp_path, method)
    assert checkpoint == applied
    for name in ("a.weight", "norm.weight"):
        results = [side[name].double().numpy() for side in sides]
        expected = merged_by_definition(before[name].double().numpy(), results, [1.0] * 3, method)
        found = torch.frombuffer(bytearray(checkpoint[name]), dtype=dtype).double().numpy().reshape(expected.shape)
        unit = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
        assert np.allclose(found, expected, rtol=unit, atol=1e-7)
    assert checkpoint["positions"] == raw_checkpoint(base)["positions"]
    assert (tmp_path / "merged" / "README.md").read_text().count("`org/tuned`") == 3


@pytest.mark.parametrize("method", ["ties", "sum"])
def test_changes_of_different_weights_merge_exactly(method: MergeMethod, tmp_path: Path) -> None:
    before = random_tensors(torch.bfloat16)
    first, second = moved(before, seed=1, size=0.3, share=1), moved(before, seed=2, size=0.3, share=1)
    upper = {name: torch.arange(one.numel()).reshape(one.shape) % 2 == 0 for name, one in before.items()}
    sides = [
        {name: torch.where(upper[name], first[name], before[name]) for name in before},
        {name: torch.where(upper[name], before[name], second[name]) for name in before},
    ]
    base, paths = deltas_of(tmp_path, before, sides)
    both = {name: torch.where(upper[name], first[name], second[name]) for name in before}
    checkpoint, applied = merged(base, paths, tmp_path, method)
    assert checkpoint == applied
    expected = {name: one.reshape(-1).view(torch.uint8).numpy().tobytes() for name, one in both.items()}
    assert checkpoint == expected


def test_a_merged_delta_file_can_round_its_values(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, paths = deltas_of(tmp_path, before, [moved(before, seed=1), moved(before, seed=2)], values="int8", ratio=0.5)
    checkpoint, applied = merged(base, paths, tmp_path, values="int8")
    assert checkpoint != applied
    numbers = [np.frombuffer(one["a.weight"], "<f4") for one in (checkpoint, applied)]
    assert np.abs(numbers[0] - numbers[1]).max() < 1e-4


def test_files_are_those_of_the_first_and_tensors_left_out_stay_named(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    paths = []
    for number, template in enumerate(("one", "two")):
        (tmp_path / str(number)).mkdir()
        base, tuned = write_pair(tmp_path / str(number), before, moved(before, seed=number))
        (tuned / "chat_template.jinja").write_text(template)
        paths.append(tmp_path / f"{number}.delta")
        make(base, tuned, paths[-1], plan(exclude=("vectors",)))
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        merge = open_merge(deltas, base, settle_plan(None, 2, "ties", 1.0))
        assert merge.files() == ({"chat_template.jinja": b"one"}, ["chat_template.jinja"])
        contents = merge_to_delta(
            merge, base, tmp_path / "m.delta", "exact", base_model=NamedModel("org/base"), run_id="0001-delta-merge"
        )
    assert list(contents.left_out) == ["norm.weight"]
    assert (contents.metadata.method, len(contents.metadata.tuned)) == ("ties", 2)


def test_deltas_of_different_bases_are_refused(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    other = {**before, "conv": before["conv"] + 1}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, one = deltas_of(tmp_path / "a", before, [moved(before)])
    _, two = deltas_of(tmp_path / "b", other, [moved(other)])
    with (
        open_delta(one[0]) as first,
        open_delta(two[0]) as second,
        pytest.raises(MaskMismatchError, match="not made from the same base") as caught,
    ):
        open_merge([first, second], base, MergePlan((1.0, 1.0)))
    assert (caught.value.key, caught.value.path) == ("conv", str(two[0]))


def test_changes_that_cancel_out_are_refused(tmp_path: Path) -> None:
    before = {"w": torch.ones(3, 3)}
    base, paths = deltas_of(tmp_path, before, [{"w": torch.full((3, 3), 1.5)}, {"w": torch.full((3, 3), 0.5)}])
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        merge = open_merge(deltas, base, MergePlan((1.0, 1.0)))
        with pytest.raises(MaskingError, match="cancel out"):
            merge_to_delta(merge, base, tmp_path / "m.delta", "exact", base_model=NamedModel("b"))
        assert merge.conflicts.opposed == 9


def test_a_merged_weight_that_overflows_and_weights_in_8_bits_are_refused(tmp_path: Path) -> None:
    before = {"w": torch.zeros(3, 3, dtype=torch.float16)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    large = {"w": torch.full((3, 3), 6e4, dtype=torch.float16)}
    base, paths = deltas_of(tmp_path / "a", before, [large, {"w": large["w"] - 32}])
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        with pytest.raises(MaskingError, match="merged weight is not finite"):
            open_merge(deltas, base, MergePlan((1.0, 1.0), "sum")).merged("w")
    eight = {"w": torch.ones(3, 3).to(torch.float8_e4m3fn)}
    base, paths = deltas_of(tmp_path / "b", eight, [{"w": (torch.ones(3, 3) * 2).to(torch.float8_e4m3fn)}] * 2)
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        with pytest.raises(MaskingError, match="8 bits cannot be merged"):
            open_merge(deltas, base, MergePlan((1.0, 1.0))).merged("w")


def test_an_existing_checkpoint_is_kept(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, paths = deltas_of(tmp_path, before, [moved(before, seed=1), moved(before, seed=2)])
    merged(base, paths, tmp_path)
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        merge = open_merge(deltas, base, MergePlan((1.0, 1.0)))
        with pytest.raises(OutputError, match="already exists"):
            merge_to_checkpoint(merge, base, tmp_path / "merged", base_model="b")


@pytest.mark.parametrize(
    ("weights", "count", "method", "scale"),
    [
        (None, 1, "ties", 1.0),
        ([1.0], 2, "ties", 1.0),
        ([1.0, 0.0], 2, "sum", 1.0),
        ([1.0, -1.0], 2, "ties", 1.0),
        ([1.0, float("nan")], 2, "sum", 1.0),
        (None, 2, "ties", 0.0),
        (None, 2, "sum", 1e9),
    ],
)
def test_weights_that_cannot_be_used(
    weights: list[float] | None, count: int, method: MergeMethod, scale: float
) -> None:
    with pytest.raises(ConfigError):
        settle_plan(weights, count, method, scale)


def test_the_plan_is_told_in_words() -> None:
    assert settle_plan(None, 2, "ties", 1.0).text == "ties"
    assert settle_plan([1, -0.5], 2, "sum", 0.3).text == "sum, weights 1,-0.5, scale 0.3"
