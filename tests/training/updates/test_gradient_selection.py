"""Selection of entries, compared with a stable sort of all of them, and the guarantees of random selection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mftctl.errors import MaskingError
from mftctl.masking.selection import removed_count
from mftctl.training.updates.gradient_selection import Scope, keep_largest, keep_random
from tests.gpu_emulation.emulated_gpu import emulated_gpu

SCOPES = st.sampled_from(["tensor", "global"])
RATIOS = st.floats(0, 0.999)
# Few values make ties common; some differ only in their last bits.
VALUES = [np.float32(value) for value in (0, 1, -1, 1 + 2**-20, -1 - 2**-20, 1 + 2**-19, 2)]
GRADIENTS = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=12), elements=st.sampled_from(VALUES)),
    min_size=1,
    max_size=5,
)


def keep_by_sorting(gradients: list[np.ndarray], ratio: float, scope: Scope) -> list[np.ndarray]:
    """Equation 3 with exact counts: a stable sort of all magnitudes, lowest first, ties by position."""
    if scope == "tensor":
        return [keep_by_sorting([gradient], ratio, "global")[0] for gradient in gradients]
    everything = np.abs(np.concatenate([gradient.ravel() for gradient in gradients]))
    keep = np.ones(everything.size, dtype=bool)
    keep[np.argsort(everything, kind="stable")[: int(np.floor(ratio * everything.size + 0.5))]] = False
    ends = np.cumsum([gradient.size for gradient in gradients])[:-1]
    return [part.reshape(gradient.shape) for part, gradient in zip(np.split(keep, ends), gradients, strict=True)]


def check_against_sorting(gradients: list[torch.Tensor], ratio: float, scope: Scope) -> None:
    expected = keep_by_sorting([gradient.double().numpy() for gradient in gradients], ratio, scope)
    for keep, right in zip(keep_largest(gradients, ratio, scope), expected, strict=True):
        assert keep.dtype == torch.bool
        assert np.array_equal(keep.numpy(), right)


def unselected(masks: list[torch.Tensor]) -> list[int]:
    return [int((~mask).sum()) for mask in masks]


@pytest.mark.slow
@given(GRADIENTS, RATIOS, SCOPES)
def test_largest_equals_a_stable_sort(gradients: list[np.ndarray], ratio: float, scope: Scope) -> None:
    check_against_sorting([torch.from_numpy(gradient) for gradient in gradients], ratio, scope)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_largest_of_real_looking_gradients(dtype: torch.dtype, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes_and_scales = [((300, 40), 1e-3), ((70,), 1.0), ((64, 100), 1e-5)]
    gradients = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in shapes_and_scales
    ]
    check_against_sorting(gradients, ratio, "tensor")
    check_against_sorting(gradients, ratio, "global")


def test_global_ranks_mixed_dtypes_by_their_exact_values() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(50, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]
    check_against_sorting(gradients, 0.4, "global")


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_fp64_values_that_fp32_cannot_tell_apart(scope: Scope) -> None:
    gradient = torch.tensor([1 + 2e-12, 1.0, 1 + 1e-12, 1 + 3e-12], dtype=torch.float64)
    assert keep_largest([gradient], 0.5, scope)[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_infinite_and_subnormal_gradients_have_a_rank(scope: Scope) -> None:
    gradient = torch.tensor([float("-inf"), 1e-45, -0.0, 0.0, 3e38])
    assert keep_largest([gradient], 0.6, scope)[0].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_zero_and_minus_zero_are_equal(scope: Scope) -> None:
    gradient = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert keep_largest([gradient], 0.5, scope)[0].tolist() == [False, False, True, True]


def test_global_ties_are_left_out_in_the_order_of_the_tensors() -> None:
    masks = keep_largest([torch.ones(2), torch.ones(2, 2), torch.ones(2)], 0.5, "global")
    assert [mask.flatten().tolist() for mask in masks] == [[False, False], [False, False, True, True], [True, True]]


def test_global_ties_next_to_values_that_differ_in_the_last_bits() -> None:
    a, b, c = VALUES[1], VALUES[3], VALUES[5]
    masks = keep_largest([torch.tensor([b, a, c]), torch.tensor([b, b, a])], 0.5, "global")
    assert [mask.tolist() for mask in masks] == [[False, False, True], [True, True, False]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_transposed_view_is_ranked_by_its_own_order(scope: Scope) -> None:
    keep = keep_largest([torch.zeros(3, 2).t()], 0.5, scope)[0]
    assert keep.tolist() == [[False, False, False], [True, True, True]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_no_tensors_and_no_entries(scope: Scope) -> None:
    assert keep_largest([], 0.5, scope) == []
    assert [mask.shape for mask in keep_largest([torch.zeros(0, 3), torch.ones(1)], 0.2, scope)] == [(0, 3), (1,)]


@pytest.mark.slow
@given(GRADIENTS, RATIOS, SCOPES, st.integers(0, 2**31), st.integers(0, 1000))
def test_random_leaves_out_the_exact_count(
    arrays: list[np.ndarray], ratio: float, scope: Scope, seed: int, step: int
) -> None:
    gradients = [torch.from_numpy(array) for array in arrays]
    masks = keep_random(gradients, ratio, scope, seed=seed, step=step)
    assert [mask.shape for mask in masks] == [gradient.shape for gradient in gradients]
    sizes = [gradient.numel() for gradient in gradients]
    if scope == "tensor":
        assert unselected(masks) == [removed_count(size, ratio) for size in sizes]
    else:
        assert sum(unselected(masks)) == removed_count(sum(sizes), ratio)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_depends_on_seed_step_and_place_alone(scope: Scope) -> None:
    def choose(gradients: list[torch.Tensor], seed: int = 1, step: int = 2) -> torch.Tensor:
        return torch.stack(keep_random(gradients, 0.5, scope, seed=seed, step=step))

    first = choose([torch.zeros(100), torch.zeros(100)])
    again = choose([torch.full((100,), float("nan")), torch.randn(100, dtype=torch.float64).bfloat16()])
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, choose([torch.zeros(100)] * 2, seed=2))
    assert not torch.equal(first, choose([torch.zeros(100)] * 2, step=3))


def test_random_masks_are_stable_across_versions() -> None:
    """A resumed training must repeat the selections of an uninterrupted one."""
    masks = keep_random([torch.zeros(8), torch.zeros(2, 4)], 0.5, "tensor", seed=3, step=7)
    assert [mask.flatten().int().tolist() for mask in masks] == [[0, 0, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_is_uniform(scope: Scope) -> None:
    """Over 600 steps every entry is left out 30 % of the time, within five standard deviations of 1.9 %."""
    gradients = [torch.zeros(10), torch.zeros(5, 6)]
    steps = 600
    left_out = torch.zeros(40)
    counts = set()
    for step in range(steps):
        masks = keep_random(gradients, 0.3, scope, seed=0, step=step)
        left_out += torch.cat([~mask.flatten() for mask in masks])
        counts.add(unselected(masks)[0])
    assert (left_out / steps - 0.3).abs().max() < 0.094
    assert counts == {3} if scope == "tensor" else counts >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(MaskingError, match="share") as caught:
        keep_largest([torch.zeros(4)], ratio)
    assert caught.value.key == "ratio"
    with pytest.raises(MaskingError, match="share"):
        keep_random([torch.zeros(4)], ratio, seed=0, step=0)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_nan_gradient_is_named(scope: Scope) -> None:
    with pytest.raises(MaskingError, match="NaN") as caught:
        keep_largest([torch.ones(3), torch.tensor([[1.0, float("nan")]])], 0.0, scope)
    assert caught.value.key == "gradients[1], shape (1, 2)"
    assert caught.value.actual == "1 NaN of 2"


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_entries_are_the_same_on_a_gpu(scope: Scope) -> None:
    shapes = [(300, 500), (7,), (0, 3), (40, 40)]
    expected = keep_random([torch.zeros(shape) for shape in shapes], 0.3, scope, seed=5, step=9)
    with emulated_gpu():
        masks = keep_random([torch.zeros(shape).cuda() for shape in shapes], 0.3, scope, seed=5, step=9)
        assert all(mask.device.type == "cuda" for mask in masks)
        found = [mask.cpu() for mask in masks]
    assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))


def test_random_choices_of_steps_and_tensors_are_independent() -> None:
    """Two choices of half of 40,000 entries share a quarter of them, within five standard deviations."""
    like = [torch.zeros(40_000), torch.zeros(40_000)]
    choices = [mask for step in range(6) for mask in keep_random(like, 0.5, seed=0, step=step)]
    choices += keep_random(like, 0.5, seed=1, step=0)
    for index, one in enumerate(choices):
        neighbours = int((one[1:] & one[:-1]).sum())
        assert abs(neighbours - 10_000) < 5 * 100
        for other in choices[:index]:
            assert abs(int((one & other).sum()) - 10_000) < 5 * 50
