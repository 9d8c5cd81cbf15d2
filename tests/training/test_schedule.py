from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.progress import Silence
from mftctl.training.loop import training_arguments
from mftctl.training.schedule import (
    accumulates,
    accumulation,
    announce_step,
    micro_batch_records,
    records_per_step,
    schedule_factors,
    total_steps,
)


@pytest.mark.parametrize(
    ("records", "options", "world_size", "expected"),
    [
        (100, {"batch_size": 8}, 1, 13),
        (100, {"batch_size": 8, "epochs": 3}, 1, 39),
        (100, {"batch_size": 8, "epochs": 0.5}, 1, 7),
        (100, {"batch_size": 8, "grad_accum_steps": 4}, 1, 4),
        (100, {"batch_size": 8}, 2, 7),
        (100, {"batch_size": 8, "epochs": 3, "max_steps": 5}, 1, 5),
        (3, {"batch_size": 8}, 1, 1),
        (100, {"batch_size": 8, "global_batch_size": 32}, 1, 4),
        (100, {"batch_size": 8, "global_batch_size": 32}, 4, 4),
        (100, {"batch_size": 8, "global_batch_size": 30, "batch_tokens": 99}, 4, 4),
        (100, {"batch_size": 8, "grad_accum_steps": 2, "batch_tokens": 99}, 2, 4),
    ],
)
def test_total_steps(records: int, options: dict[str, float], world_size: int, expected: int) -> None:
    assert total_steps(records, FftOptions(**options), world_size) == expected


@pytest.mark.parametrize(("world_size", "expected"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_the_global_batch(world_size: int, expected: int) -> None:
    options = FftOptions(batch_size=8, global_batch_size=32)
    assert accumulation(options, world_size) == expected
    assert records_per_step(options, world_size) == 32


def test_a_global_batch_that_cannot_be_divided_among_the_processes() -> None:
    with pytest.raises(ConfigError, match="cannot be divided evenly") as caught:
        announce_step(FftOptions(batch_size=8, global_batch_size=32), 3, Silence())
    assert (caught.value.key, caught.value.actual) == ("global_batch_size", 32)


def test_a_token_budget_needs_no_multiple() -> None:
    options = FftOptions(batch_size=8, global_batch_size=30, batch_tokens=100)
    announce_step(options, 4, Silence())
    assert records_per_step(options, 4) == 30
    assert [micro_batch_records(options, length) for length in (1, 30, 101)] == [30, 3, 1]
    assert micro_batch_records(FftOptions(batch_size=8), 101) == 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"grad_accum_steps": 2}, True),
        ({"batch_size": 8, "global_batch_size": 8}, False),
        ({"batch_size": 8, "global_batch_size": 16}, True),
        ({"batch_size": 1, "batch_tokens": 10}, False),
        ({"batch_size": 2, "batch_tokens": 10}, True),
    ],
)
def test_gradient_accumulation(options: dict[str, int], expected: bool) -> None:
    assert accumulates(FftOptions.model_validate(options)) is expected


@pytest.mark.parametrize(
    ("options", "world_size", "expected"),
    [
        ({"batch_size": 4, "grad_accum_steps": 2}, 8, ["Records per optimizer step: 64 (4 per forward pass, 2 "]),
        ({"batch_size": 4, "grad_accum_steps": 2}, 1, []),
        ({"batch_size": 4, "global_batch_size": 32}, 8, []),
    ],
)
def test_the_records_per_step_are_reported_if_they_depend_on_the_processes(
    options: dict[str, int], world_size: int, expected: list[str]
) -> None:
    notes = Notes()
    announce_step(FftOptions.model_validate(options), world_size, notes)
    assert [note[: len(expected[0])] for note in notes.notes] == expected


class Notes(Silence):
    """A listener that records notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_factors_are_those_of_the_trainer(schedule: str, warmup_ratio: float, steps: int, tmp_path: Path) -> None:
    options = FftOptions(schedule=schedule, warmup_ratio=warmup_ratio, decay_ratio=0.3)  # type: ignore[arg-type]
    arguments = training_arguments(tmp_path, options, steps=steps, learning_rate=2.0, seed=0, bf16=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        int(arguments.warmup_steps),
        steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or {},
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0 * factor for factor in schedule_factors(steps, options)])


def test_a_stable_rate_decays_over_its_share_of_the_steps() -> None:
    options = FftOptions(schedule="wsd", warmup_ratio=0.2, decay_ratio=0.4)
    assert schedule_factors(10, options) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert schedule_factors(10, FftOptions(schedule="constant", warmup_ratio=0.2))[2:] == [1.0] * 8
