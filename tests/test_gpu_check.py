"""`scripts/gpu_check` without a GPU: a rehearsal of its parts, and the handling of steps that fail or hang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check.findings import Check, Finding, Measurement
from scripts.gpu_check.isolated import End, Step, run_isolated
from scripts.gpu_check.kernels import kernels
from scripts.gpu_check.masks import equal_masks
from scripts.gpu_check.scale import REHEARSAL, Scale
from scripts.gpu_check.table import markdown
from scripts.gpu_check.training_steps import fine_tuning_steps, mask_training
from scripts.gpu_check.versions import versions
from tests.gpu_emulation.emulated_gpu import emulated_gpu

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true", "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def fails(scale: Scale) -> Iterator[Finding]:
    yield Measurement("before", 1.0)
    raise ValueError("a fault of the step")


def hangs(scale: Scale) -> Iterator[Finding]:
    yield Measurement("before", 1.0)
    time.sleep(60)


def dies(scale: Scale) -> Iterator[Finding]:
    yield Measurement("before", 1.0)
    os._exit(7)


def works(scale: Scale) -> Iterator[Finding]:
    yield Check("lies on the emulated GPU", torch.zeros(1, device="cuda").is_cuda)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "status", "error"),
    [(fails, "failed", "a fault of the step"), (hangs, "stopped", "no end within"), (dies, "failed", "exit code 7")],
)
def test_a_failed_step_keeps_its_findings(work: object, status: str, error: str) -> None:
    found: list[Finding] = []
    end = run_isolated(Step("step", work, 2), REHEARSAL, 2.0, found.append)  # type: ignore[arg-type]
    assert (end.status, found) == (status, [Measurement("before", 1.0)])
    assert error in end.error
    assert end.seconds < 30


@pytest.mark.slow
def test_the_next_step_runs_and_every_line_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "all_steps", lambda: [Step("first", fails, 5), Step("second", works, 5)])
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path)]) == 1
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        ("first", "measurement"), ("first", "end"), ("second", "check"), ("second", "end"),
    ]  # fmt: skip
    assert lines[2]["holds"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert "first: failed" in table
    assert "rehearsal: values are not meaningful" in table
    assert table in capsys.readouterr().out


def test_steps_without_time_left_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "all_steps", lambda: [Step("late", works, 5)])
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path), "--seconds", "0"]) == 1
    assert "no time was left" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.slow
def test_masks_and_kernels() -> None:
    with emulated_gpu():
        checks = list(equal_masks(REHEARSAL))
        measurements = list(kernels(REHEARSAL))
        machine = {measurement.what: measurement.value for measurement in versions(REHEARSAL)}
    assert len(checks) > 30
    assert all(check.holds for check in checks)
    assert any(measurement.what.startswith("StochasticAdamW") for measurement in measurements)
    assert machine["GPU"] == "Emulated GPU"


def test_a_mask_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []

    def differing(values: torch.Tensor, ratio: float) -> torch.Tensor:
        kept.append(torch.full(values.shape, len(kept) % 2 == 0))
        return kept[-1]

    monkeypatch.setattr("scripts.gpu_check.masks.keep_highest", differing)
    with emulated_gpu():
        check = next(equal_masks(REHEARSAL))
    assert not check.holds
    assert "10000 differ" in check.detail


@pytest.mark.slow
def test_training_steps_are_shown_with_their_estimates() -> None:
    with emulated_gpu():
        masks = list(mask_training(REHEARSAL, REHEARSAL.small, "mask", {"layers": "1", "low_memory": True}))
        tuning = list(fine_tuning_steps(REHEARSAL, REHEARSAL.small, "fft", {"method": "lora"}))
    for found, name in ((masks, "mask"), (tuning, "fft")):
        measurements = {item.what: item for item in found if isinstance(item, Measurement)}
        assert float(measurements[f"{name}: step"].value) > 0
        estimate = measurements[f"{name}: peak"].estimate
        assert estimate is not None
        assert estimate > 0
    assert all(item.holds for item in masks if isinstance(item, Check))


def test_the_table_shows_values_beside_estimates_and_failed_checks() -> None:
    findings = {
        "step": [Measurement("peak", 12.345, "GB", 13.0), Check("equal", False, "3 differ"), Check("same", True)]
    }
    text = markdown("GPU, today", findings, {"step": End("done", 4.2)})
    assert "| peak | 12.35 GB | 13 GB |" in text
    assert "- **does not hold**: equal (3 differ)" in text
    assert "- holds: same" in text
