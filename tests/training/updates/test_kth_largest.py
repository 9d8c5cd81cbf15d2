"""Selection by bracket and by digits compared with a stable sort, with brackets and passes of a few entries."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mftctl.masking.selection import removed_count
from mftctl.training.updates import kth_largest
from mftctl.training.updates.gradient_selection import keep_largest
from mftctl.training.updates.kth_largest import Reader, keep_by_bracket, keep_by_digits

INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def small_passes() -> Iterator[None]:
    """Exercises the code paths for millions of entries with a few entries."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_CHUNK_ENTRIES": 8,
            "_SAMPLE_ALL": 4,
            "_STRIDE": 3,
            "_MOST_SAMPLES": 16,
            "_DEVIATIONS": 1.0,
        }.items():
            patch.setattr(kth_largest, name, value)
        yield


def keep_by_sorting(arrays: list[np.ndarray], count: int) -> list[np.ndarray]:
    everything = np.concatenate([np.abs(array.astype(np.int64)) for array in arrays])
    keep = np.ones(everything.size, dtype=bool)
    keep[np.argsort(everything, kind="stable")[:count]] = False
    return np.split(keep, np.cumsum([array.size for array in arrays])[:-1])


def reader(array: np.ndarray) -> Reader:
    return lambda start, stop, step: array[start:stop:step]


ELEMENTS = st.one_of(st.integers(0, 3), st.integers(0, 2**15 - 1))
ARRAYS = st.lists(hnp.arrays(np.int16, st.integers(0, 60), elements=ELEMENTS), min_size=1, max_size=4).filter(
    lambda arrays: sum(array.size for array in arrays) > 0
)


@pytest.mark.slow
@given(ARRAYS, st.floats(0, 1))
def test_a_bracket_gives_the_exact_selection_or_none(arrays: list[np.ndarray], share: float) -> None:
    sizes = [array.size for array in arrays]
    count = max(1, round(share * sum(sizes)))
    expected = keep_by_sorting(arrays, count)
    found = keep_by_bracket([reader(array) for array in arrays], sizes, count)
    if found is not None:
        assert all(np.array_equal(one.keep, right) for one, right in zip(found, expected, strict=True))
        assert [one.highest for one in found] == [max(array.tolist(), default=0) for array in arrays]


@pytest.mark.slow
@given(ARRAYS, st.floats(0, 1))
def test_digits_give_the_exact_selection(arrays: list[np.ndarray], share: float) -> None:
    count = max(1, round(share * sum(array.size for array in arrays)))
    for dtype in (torch.int16, torch.int32, torch.int64):
        wide = [torch.from_numpy(array).to(dtype) << 8 * (dtype.itemsize - 2) for array in arrays]
        found = keep_by_digits([lambda tensor=tensor: tensor for tensor in wide], count)
        expected = keep_by_sorting(arrays, count)
        assert all(np.array_equal(one.numpy(), right) for one, right in zip(found, expected, strict=True))


def number_of_bits(pattern: int, dtype: torch.dtype) -> torch.Tensor:
    bits = np.array(pattern).astype(INTEGERS[dtype.itemsize])
    return torch.from_numpy(bits.reshape(1)).view(dtype)


@pytest.mark.slow
@given(st.data(), st.sampled_from(DTYPES), st.floats(0, 0.99), st.sampled_from(["tensor", "global"]))
def test_any_bit_patterns_are_ranked_by_magnitude(data: st.DataObject, dtype: torch.dtype, ratio: float, scope) -> None:
    """Zeros of both signs, subnormal numbers and infinity, with ties anywhere."""
    width = 8 * dtype.itemsize
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(getattr(torch, f"int{width}")))
    few = [0, 1, 2, infinity, infinity - 1, infinity // 2]
    magnitudes = st.one_of(st.sampled_from(few), st.integers(0, infinity))
    patterns = st.lists(st.tuples(magnitudes, st.booleans()), min_size=1, max_size=80)
    tensors = [
        torch.cat([number_of_bits(size - (2 ** (width - 1) if negative else 0), dtype) for size, negative in drawn])
        for drawn in data.draw(st.lists(patterns, min_size=1, max_size=3))
    ]
    groups = [tensors] if scope == "global" else [[tensor] for tensor in tensors]
    expected = []
    for group in groups:
        ranked = [tensor.double().abs() for tensor in group]
        order = torch.cat(ranked).sort(stable=True).indices
        keep = torch.ones(order.numel(), dtype=torch.bool)
        keep[order[: removed_count(order.numel(), ratio)]] = False
        expected += keep.split([tensor.numel() for tensor in group])
    found = keep_largest(tensors, ratio, scope)
    assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))


@pytest.fixture
def real_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_CHUNK_ENTRIES": 1 << 16,
        "_SAMPLE_ALL": 1 << 12,
        "_STRIDE": 31,
        "_MOST_SAMPLES": 1 << 18,
        "_DEVIATIONS": 3.5,
    }.items():
        monkeypatch.setattr(kth_largest, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("real_passes")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "rows of zeros", "constant", "rows of other scale"])
def test_many_entries_are_selected_by_one_pass(
    kind: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a sort, without counting digits wherever a sample suffices."""
    values = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)) * 1e-3
    if kind == "rows of zeros":  # embeddings of tokens that do not occur in a batch
        values[:250] = 0.0
    if kind == "constant":
        values[:] = 0.5
    if kind == "rows of other scale":
        values *= torch.logspace(-3, 3, 400)[:, None]
    gradients = [values.to(dtype), torch.zeros(0, dtype=dtype), torch.ones(3, dtype=dtype)]
    counted: list[int] = []
    monkeypatch.setattr(
        "mftctl.training.updates.gradient_selection.keep_by_digits",
        lambda readers, count: [counted.append(count), keep_by_digits(readers, count)][1],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = keep_largest(gradients, 0.3)[0]
    finally:
        torch.set_num_threads(before)
    order = gradients[0].flatten().double().abs().sort(stable=True).indices
    expected = torch.ones(order.numel(), dtype=torch.bool)
    expected[order[:60_000]] = False
    assert torch.equal(found.flatten(), expected)
    if kind != "constant":
        assert counted in ([], [1])  # 1: one of the three ones, all of which are equal
