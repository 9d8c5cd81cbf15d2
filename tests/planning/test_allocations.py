"""The meter against tensors whose sizes are known."""

from __future__ import annotations

import torch

from mftctl.planning.allocations import AllocationMeter
from mftctl.planning.skeletons import build_skeleton, without_data
from tests.conftest import build_llama


def test_peak_and_rest() -> None:
    with AllocationMeter() as meter:
        kept = torch.zeros(1000)
        for _ in range(3):
            kept = kept + 1  # two at once while it is computed
        assert meter.live_bytes == 4000
    assert meter.peak_bytes == 8000


def test_views_and_what_was_there_before_do_not_count() -> None:
    before = torch.zeros(10, 10)
    with AllocationMeter([before]) as meter:
        views = (before.t(), before.view(100), before.add_(1))
        assert (meter.live_bytes, len(views)) == (0, 3)


def test_gradients_are_told_apart() -> None:
    weight = torch.zeros(100, 50, requires_grad=True)
    with AllocationMeter([weight]) as meter:
        weight.register_post_accumulate_grad_hook(meter.mark_gradient)
        (torch.zeros(4, 100) @ weight).exp().sum().backward()
    assert meter.gradient_bytes == 20_000
    assert meter.peak_bytes >= meter.peak_other_bytes >= 4 * (4 * 100 + 4 * 50)
    weight.grad = None
    assert meter.gradient_bytes == 0


def test_a_model_without_data_allocates_what_the_real_one_does() -> None:
    real = build_llama().train()
    fake = build_skeleton(real.config, torch.float32).train()

    def run(model: torch.nn.Module) -> AllocationMeter:
        ids = torch.zeros(3, 20, dtype=torch.int64)
        mask = torch.ones(3, 1, 20, 20, dtype=torch.bool)
        with AllocationMeter([*model.parameters(), *model.buffers(), ids, mask]) as meter:
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
        return meter

    expected = run(real)
    with without_data(fake, torch.device("cpu")):
        found = run(fake)
    assert (found.peak_bytes, found.live_bytes) == (expected.peak_bytes, expected.live_bytes)
