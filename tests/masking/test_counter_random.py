"""Counter-based random bits: the published generator, independent of chunking, and uniform."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.masking.counter_random import random_bits, stream_key
from tests.gpu_emulation.emulated_gpu import emulated_gpu

CPU = torch.device("cpu")


def split_mix(state: int, count: int) -> list[int]:
    """SplitMix64 as published, one number at a time, as signed integers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % (1 << 64)
        value = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
        found.append(value - (1 << 64) if value >> 63 else value)
    return found


def on_gpu(key: int, start: int, stop: int, step: int = 1) -> torch.Tensor:
    with emulated_gpu():
        return random_bits(key, start, stop, step, device=torch.device("cuda", 0)).cpu()


@given(st.integers(0, 2**64 - 1), st.integers(0, 40), st.integers(0, 40), st.integers(1, 7))
def test_it_is_the_published_generator(key: int, start: int, count: int, step: int) -> None:
    expected = split_mix(key, start + count)[start::step]
    assert random_bits(key, start, start + count, step, device=CPU).tolist() == expected


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 40_000, 1), (5, 5, 1), (2**33, 2**33 + 9, 1), (7, 99_999, 31)])
def test_devices_agree(start: int, stop: int, step: int) -> None:
    key = stream_key("device", 1)
    assert torch.equal(random_bits(key, start, stop, step, device=CPU), on_gpu(key, start, stop, step))


def test_the_first_published_number() -> None:
    assert random_bits(1234567, 0, 1, device=CPU).tolist() == [6457827717110365317]


def test_chunks_of_any_size_give_the_same() -> None:
    whole = random_bits(3, 0, 50_000, device=CPU)
    parts = [random_bits(3, start, min(start + 16_385, 50_000), device=CPU) for start in range(0, 50_000, 16_385)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.slow
def test_bits_are_uniform_and_independent() -> None:
    """Within five standard deviations, for single bits, pairs of bits, neighbours and two streams."""
    count = 1 << 16
    streams = [random_bits(stream_key("a", 0, index), 0, count, device=CPU) for index in range(2)]
    bits = torch.stack([(streams[0] >> bit) & 1 for bit in range(64)]).double() * 2 - 1
    other = torch.stack([(streams[1] >> bit) & 1 for bit in range(64)]).double() * 2 - 1
    bound = 5 / count**0.5
    assert bits.mean(1).abs().max() < bound
    assert ((bits @ bits.T) / count - torch.eye(64)).abs().max() < bound
    assert ((bits[:, 1:] @ bits[:, :-1].T) / (count - 1)).abs().max() < bound
    assert ((bits @ other.T) / count).abs().max() < bound


def test_sixteen_bits_are_uniform() -> None:
    low = random_bits(stream_key("b"), 0, 1 << 18, device=CPU).view(torch.int16).view(-1, 4)
    for field in range(4):
        counts = torch.bincount(low[:, field].int() + (1 << 15) >> 6, minlength=1024).double()
        chi_squared = ((counts - 256) ** 2 / 256).sum()
        assert abs(float(chi_squared) - 1023) < 5 * (2 * 1023) ** 0.5


def test_keys_follow_from_names() -> None:
    keys = {stream_key("x", step, index) for step in range(30) for index in range(30)}
    assert len(keys) == 900
    assert stream_key("x", 1, 2) == stream_key("x", 1, 2) != stream_key("x", 12)
