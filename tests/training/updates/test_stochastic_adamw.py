"""AdamW in bf16: unbiased on average, with reproducible noise, and close to torch's AdamW in fp32."""

from __future__ import annotations

import io
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.training.updates import stochastic_adamw
from mftctl.training.updates.stochastic_adamw import StochasticAdamW, round_stochastically, step_workspace_bytes
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from tests.gpu_emulation.emulated_gpu import emulated_gpu

ALL_NOISE = torch.arange(1 << 16, dtype=torch.int32)


@pytest.mark.slow
@given(st.floats(width=32, allow_nan=False))
def test_the_mean_of_rounded_values_over_all_noise_is_the_value(value: float) -> None:
    rounded = round_stochastically(torch.full((1 << 16,), value), ALL_NOISE)
    near = rounded.unique()
    assert len(near) <= 2
    if torch.isfinite(near).all():
        assert float(rounded.double().mean()) == value


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 0.0, -0.0, 1.0, -2.5])
def test_values_representable_in_bf16_are_unchanged(value: float) -> None:
    rounded = round_stochastically(torch.full((1 << 16,), value), ALL_NOISE)
    assert (rounded == value).all()
    assert round_stochastically(torch.full((4,), float("nan")), ALL_NOISE[-4:]).isnan().all()


def train(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def parameter(seed: int = 0, shape: tuple[int, ...] = (300, 1000)) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16())


def test_on_average_it_follows_adamw_in_fp32() -> None:
    """Steps of a thousandth of a bf16 spacing, which rounding to nearest would lose entirely."""
    low = torch.nn.Parameter(torch.ones(200, 1000).bfloat16())
    high = torch.nn.Parameter(torch.ones(200, 1000))
    options = {"lr": 1e-5, "eps": 1e-8, "weight_decay": 0.1}
    ours = StochasticAdamW([low], seed=0, **options)
    theirs = torch.optim.AdamW([high], **options)
    for step in range(20):
        gradient = torch.randn(200, 1000, generator=torch.Generator().manual_seed(step)) + 1.0
        low.grad, high.grad = gradient.bfloat16(), gradient.bfloat16().float()
        ours.step()
        theirs.step()
    moved, expected = float((low.detach().double() - 1).mean()), float((high.detach().double() - 1).mean())
    assert moved == pytest.approx(expected, rel=0.02)
    for key in ("exp_avg", "exp_avg_sq"):
        mean, its = ours.state[low][key].double().mean(), theirs.state[high][key].double().mean()
        assert float(mean) == pytest.approx(float(its), rel=0.01)
        assert ours.state[low][key].dtype == torch.bfloat16


def test_one_step_equals_adamw_except_for_rounding() -> None:
    low, high = parameter(), torch.nn.Parameter(parameter().detach().float())
    options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}
    train(StochasticAdamW([low], seed=0, **options), low, range(1))
    high.grad = torch.randn(high.shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    torch.optim.AdamW([high], **options).step()
    spacing = torch.exp2(torch.floor(torch.log2(high.detach().abs())) - 7)
    assert ((low.detach().float() - high.detach()).abs() <= spacing).all()


def test_the_noise_follows_from_the_seed_and_continues_after_resuming() -> None:
    options = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
    whole, other, resumed = parameter(), parameter(), parameter()
    train(StochasticAdamW([whole], seed=1, **options), whole, range(6))
    train(StochasticAdamW([other], seed=2, **options), other, range(6))
    assert not torch.equal(whole, other)

    first = StochasticAdamW([resumed], seed=1, **options)
    train(first, resumed, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = StochasticAdamW([resumed], seed=1, **options)
    second.load_state_dict(torch.load(file))
    assert second.state[resumed]["exp_avg_sq"].dtype == torch.bfloat16
    train(second, resumed, range(3, 6))
    assert torch.equal(whole, resumed)


def test_parameters_without_a_gradient_stay_and_equal_ones_get_independent_noise() -> None:
    one, two, idle = parameter(), parameter(), parameter()
    optimizer = StochasticAdamW(
        [{"params": [one, idle], "lr": 1e-3}, {"params": [two]}], eps=1e-8, weight_decay=0.0, seed=0
    )
    train(optimizer, one, range(1))
    two.grad = one.grad
    train(optimizer, one, range(1, 2))
    assert torch.equal(idle, parameter())
    assert idle not in optimizer.state
    assert not torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [1000, 1 << 17])
def test_chunks_of_any_size_give_the_same_bits(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    one, other = parameter(), parameter()
    train(StochasticAdamW([one], seed=1, **options), one, range(3))
    monkeypatch.setattr(stochastic_adamw, "_CPU_ENTRIES", entries)
    train(StochasticAdamW([other], seed=1, **options), other, range(3))
    assert torch.equal(one, other)


def test_a_gpu_rounds_with_the_same_noise() -> None:
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    here = parameter()
    train(StochasticAdamW([here], seed=1, **options), here, range(3))
    with emulated_gpu():
        there = torch.nn.Parameter(parameter().detach().cuda())
        optimizer = StochasticAdamW([there], seed=1, **options)
        for step in range(3):
            gradient = torch.randn(there.shape, generator=torch.Generator().manual_seed(step)).to(there.dtype)
            there.grad = gradient.cuda()
            optimizer.step()
        moved = there.detach().cpu()
    assert torch.equal(moved, here)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [1 << 12, 1 << 20])
def test_a_step_allocates_the_estimated_memory(entries: int) -> None:
    low = parameter(shape=(300, 2000))
    optimizer = StochasticAdamW([low], seed=1, lr=1e-2, eps=1e-8, weight_decay=0.1)
    train(optimizer, low, range(1))
    with mock.patch.object(stochastic_adamw, "_CPU_ENTRIES", entries):
        allowed = step_workspace_bytes(low.numel(), low.device)
        tensors = [low, low.grad, optimizer.state[low]["exp_avg"], optimizer.state[low]["exp_avg_sq"]]
        with AllocationMeter([tensor.detach() for tensor in tensors if tensor is not None]) as meter:
            optimizer.step()
    assert allowed * 0.7 < add_up(meter.events).peak_bytes <= allowed
