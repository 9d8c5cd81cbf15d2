"""Selection from gradients read one at a time equals selection from all of them together."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import MaskingError
from mftctl.training.sharding.gradients import select_whole
from mftctl.training.updates.gradient_selection import keep_largest, keep_random
from mftctl.training.updates.masked_optimizer import UpdateRule


def selected(gradients: list[torch.Tensor], rule: UpdateRule, step: int) -> list[torch.Tensor]:
    masks: dict[int, torch.Tensor] = {}
    shapes = [gradient.shape for gradient in gradients]
    select_whole(
        shapes, lambda index: gradients[index].clone(), rule, step, masks.__setitem__, device=torch.device("cpu")
    )
    assert list(masks) == list(range(len(gradients)))
    return list(masks.values())


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ratio=st.floats(0, 0.95),
    scope=st.sampled_from(["tensor", "global"]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_selection_of_one_process(
    sizes: list[int], ratio: float, scope: Literal["tensor", "global"], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randint(-4, 5, (size,), generator=generator).float() for size in sizes]
    for found, expected in zip(
        selected(gradients, UpdateRule("gmt", ratio, scope), 0), keep_largest(gradients, ratio, scope), strict=True
    ):
        assert torch.equal(found, expected)
    for found, expected in zip(
        selected(gradients, UpdateRule("random", ratio, scope, seed=seed), 7),
        keep_random(gradients, ratio, scope, seed=seed, step=7),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_nan() -> None:
    with pytest.raises(MaskingError, match="Gradients must not contain NaN"):
        selected([torch.tensor([1.0, float("nan")])], UpdateRule("gmt", 0.5), 0)
