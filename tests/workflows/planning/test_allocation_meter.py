"""The allocation meter, tested with tensors of known sizes."""

from __future__ import annotations

import pytest
import torch

from mftctl.masking.checkpoints.meta_models import build_skeleton, without_data
from mftctl.workflows.planning.allocation_meter import AllocationMeter, Event, Stretch, Tally, add_up
from tests.conftest import build_llama


def test_peak_and_rest() -> None:
    with AllocationMeter() as meter:
        kept = torch.zeros(1000)
        for _ in range(3):
            kept = kept + 1  # both exist during the computation
        assert add_up(meter.events).live_bytes == 4000
    assert add_up(meter.events).peak_bytes == 8000


def test_views_and_earlier_tensors_do_not_count() -> None:
    before = torch.zeros(10, 10)
    with AllocationMeter([before]) as meter:
        views = (before.t(), before.view(100), before.add_(1))
        assert (meter.events, len(views)) == ([], 3)


def test_a_sparse_tensor_counts_as_its_positions_and_values() -> None:
    with AllocationMeter() as meter:
        kept = torch.sparse_coo_tensor(
            torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5), (10, 10), check_invariants=False
        )
        assert add_up(meter.events).live_bytes == 2 * 5 * 8 + 5 * 4
    assert kept.is_sparse


def test_gradients_are_counted_separately() -> None:
    weight = torch.zeros(100, 50, requires_grad=True)
    with AllocationMeter([weight]) as meter:
        weight.register_post_accumulate_grad_hook(meter.mark_gradient)
        (torch.zeros(4, 100) @ weight).exp().sum().backward()
    tally = add_up(meter.events)
    assert tally.gradient_bytes == 20_000
    assert tally.peak_bytes >= tally.peak_other_bytes >= 4 * (4 * 100 + 4 * 50)
    weight.grad = None
    assert add_up(meter.events).gradient_bytes == 0


def test_events_have_their_time_and_that_of_their_storage() -> None:
    first, second = Stretch("forward", 0), Stretch("forward", 1)
    with AllocationMeter() as meter:
        meter.stretch = first
        kept = torch.zeros(10)
        meter.stretch = second
        del kept
    assert meter.events == [Event(first, first, 40), Event(second, first, -40)]


def test_a_gradient_is_counted_only_as_a_gradient() -> None:
    now = Stretch()
    events = [Event(now, now, 100), Event(now, now, 0, 100), Event(now, now, 30), Event(now, now, -100, -100)]
    assert add_up(events) == Tally(live_bytes=30, gradient_bytes=0, peak_bytes=130, peak_other_bytes=100)


@pytest.mark.slow
def test_a_model_without_data_allocates_as_much_as_the_real_one() -> None:
    real = build_llama().train()
    fake = build_skeleton(real.config, torch.float32).train()

    def run(model: torch.nn.Module) -> Tally:
        ids = torch.zeros(3, 20, dtype=torch.int64)
        mask = torch.ones(3, 1, 20, 20, dtype=torch.bool)
        with AllocationMeter([*model.parameters(), *model.buffers(), ids, mask]) as meter:
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
        return add_up(meter.events)

    expected = run(real)
    with without_data(fake, torch.device("cpu")):
        found = run(fake)
    assert (found.peak_bytes, found.live_bytes) == (expected.peak_bytes, expected.live_bytes)
