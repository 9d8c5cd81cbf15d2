"""Selection on accelerators, computed here on the CPU: bit-identical to CPU selection, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskingError
from mftctl.masking import device_selection
from mftctl.masking.device_selection import Ranked, Selection, keep_beyond, leave_out_lowest, selection_workspace_bytes
from mftctl.masking.selection import Ranking, keep_highest, rank, ratio_cut, removed_count
from mftctl.training.updates.gradient_selection import keep_largest
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from tests.gpu_emulation.emulated_gpu import emulated_gpu

SMALL = {
    "_PART_ENTRIES": 16,
    "_SORT_ALL": 8,
    "_STRIDE": 3,
    "_MOST_SAMPLES": 16,
    "_DEVIATIONS": 1.0,
    "_INSIDE_SHARE": 2,
    "_WIDTH": 4,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STRANGE = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-7, -3.0, 3.0, float("inf"), float("-inf")]
VALUES = st.lists(st.one_of(st.sampled_from(STRANGE), st.floats(-4, 4, width=16)), min_size=1, max_size=90)


@pytest.fixture
def real_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL.items():
        monkeypatch.setattr(device_selection, name, value)


REAL = {name: getattr(device_selection, name) for name in SMALL}


@pytest.fixture(scope="module", autouse=True)
def small_passes() -> Iterator[None]:
    """Exercises the code paths for millions of entries with a few entries."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(device_selection, name, value)
        yield


def numbers(values: torch.Tensor) -> Ranked:
    return Ranked(values.numel(), lambda start, stop, step: values[start:stop:step])


def by_sorting(tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    everything = torch.cat(tensors).double()
    keep = torch.ones(everything.numel(), dtype=torch.bool)
    keep[torch.from_numpy(np.argsort(everything.numpy(), kind="stable")[:count].copy())] = False
    return list(keep.split([tensor.numel() for tensor in tensors]))


def check(found: Selection, tensors: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert not any(found.holds_nan)
    offset = 0
    for tensor, keep, right in zip(tensors, found.keep, expected, strict=True):
        assert torch.equal(keep, right)
        assert torch.equal(keep_beyond(found.cut, numbers(tensor), offset), right)
        offset += tensor.numel()


@pytest.mark.slow
@given(st.lists(VALUES, min_size=1, max_size=3), st.sampled_from([*DTYPES, torch.int32]), st.floats(0, 1))
def test_every_way_equals_a_stable_sort(drawn: list[list[float]], dtype: torch.dtype, share: float) -> None:
    tensors = [torch.tensor(values).nan_to_num(posinf=9, neginf=-9).to(dtype) for values in drawn]
    if dtype.is_floating_point:
        tensors = [torch.tensor(values, dtype=dtype) for values in drawn]
    count = max(1, round(share * sum(map(len, drawn))))
    expected = by_sorting(tensors, count)
    ranked = list(map(numbers, tensors))
    check(leave_out_lowest(ranked, count), tensors, expected)
    check(device_selection._by_sorting(ranked, count), tensors, expected)
    check(device_selection._by_counting(ranked, count), tensors, expected)
    ends = device_selection._bracket(ranked, count)
    for found in (
        device_selection._by_scan(ranked, count, *ends),
        device_selection._by_ties(ranked, count, ends),
    ):
        if found is not None:
            check(found, tensors, expected)


@pytest.mark.slow
@given(VALUES, st.sampled_from(DTYPES), st.floats(0, 0.99), st.sampled_from(["absolute", "signed"]))
@settings(max_examples=40)
def test_masks_are_those_of_the_cpu(values: list[float], dtype: torch.dtype, ratio: float, ranking: Ranking) -> None:
    scores = torch.tensor(values, dtype=dtype)
    expected = keep_highest(scores, ratio, ranking=ranking)
    with emulated_gpu():
        ours = scores.cuda()
        keep = keep_highest(ours, ratio, ranking=ranking)
        again = keep_highest(ours, ratio, ratio_cut(ours, ratio, ranking), ranking=ranking)
        assert keep.device.type == again.device.type == "cuda"
        found = keep.cpu(), again.cpu()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.slow
@given(
    st.lists(st.tuples(VALUES, st.sampled_from(DTYPES)), min_size=1, max_size=3),
    st.floats(0, 0.99),
    st.sampled_from(["tensor", "global"]),
)
def test_gradients_are_selected_as_on_the_cpu(
    drawn: list[tuple[list[float], torch.dtype]], ratio: float, scope
) -> None:
    gradients = [torch.tensor(values, dtype=dtype) for values, dtype in drawn]
    expected = keep_largest(gradients, ratio, scope)
    with emulated_gpu():
        found = [mask.cpu() for mask in keep_largest([gradient.cuda() for gradient in gradients], ratio, scope)]
    assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("real_passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_projection_of_an_8b_model(dtype: torch.dtype) -> None:
    """16.8 million scores, including zeros of both signs and ties."""
    scores = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.01
    scores[::7, ::3] = 0.0
    scores[1::7, ::3] = -0.0
    scores[100:1100] = scores[2000:3000]
    scores = scores.to(dtype)
    count = removed_count(scores.numel(), 0.1)
    flat = rank(scores, "absolute").view(-1)
    found = leave_out_lowest([numbers(flat)], count)
    assert torch.equal(found.keep[0].view(scores.shape), keep_highest(scores, 0.1, ranking="absolute"))


@pytest.mark.parametrize("way", ["_by_sorting", "_by_counting"])
def test_nan_is_attributed_to_its_tensor(way: str) -> None:
    tensors = [torch.ones(20), torch.empty(0), torch.cat([torch.ones(17), torch.tensor([float("nan")]), torch.ones(3)])]
    assert getattr(device_selection, way)(list(map(numbers, tensors)), 5).holds_nan == [False, False, True]


def test_scores_that_are_not_numbers() -> None:
    with emulated_gpu():
        for values, ratio in (([1.0, float("nan")] * 30, 0.5), ([1.0, float("nan")], 0.0)):
            with pytest.raises(MaskingError, match="NaN, which cannot be ranked") as caught:
                keep_highest(torch.tensor(values).cuda(), ratio)
            assert caught.value.actual == f"{len(values) // 2} NaN of {len(values)}"


@pytest.mark.usefixtures("real_passes")
@pytest.mark.parametrize("kind", ["normal", "equal", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_allocates_no_more_than_estimated(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_selection, "_MOST_SAMPLES", 1 << 12)
    monkeypatch.setattr(device_selection, "_SORT_ALL", 1 << 12)
    monkeypatch.setattr(device_selection, "_PART_ENTRIES", 1 << 17)
    values = torch.randn(600_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    if kind != "normal":
        values = torch.where(values > (9 if kind == "equal" else 0.5), values, 0.0).to(dtype)
    read = Ranked(values.numel(), lambda start, stop, step: values[start:stop:step].abs())
    with AllocationMeter([values]) as meter:
        leave_out_lowest([read], 60_000)
    peak = add_up(meter.events).peak_bytes
    allowed = selection_workspace_bytes(values.numel(), values.numel(), values.element_size()) + values.numel()
    assert allowed / 4 < peak <= allowed
