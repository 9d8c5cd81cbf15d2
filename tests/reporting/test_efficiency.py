from __future__ import annotations

from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.efficiency import Efficiency, efficiencies
from tests.reporting.training_folders import write_training


def found_in(root: Path) -> tuple[list[Efficiency], list[str]]:
    return efficiencies(list_runs(root)[0])


def test_speed_is_that_of_the_steps_after_the_first(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "fft", "FFT", step_seconds=[9.0, 1.0, 1.0, 2.0])
    ([entry], problems) = found_in(tmp_path)
    assert problems == []
    assert entry.tokens_per_second == pytest.approx(300 / 4.0)
    assert entry.samples_per_second == pytest.approx(6 / 4.0)
    assert (entry.tokens, entry.flops, entry.seconds) == (400, 6_000 * 400, 20.0)
    assert (entry.peak_memory_bytes, entry.runs) == (2_000_000_000, ("001-fft",))


def test_seeds_of_a_stage_are_averaged_and_the_newest_of_a_seed_counts(tmp_path: Path) -> None:
    common = {"recipe": "study", "stage": "fft"}
    write_training(tmp_path, 1, "fft", "FFT", step_seconds=[1, 100, 100, 100], seed=0, **common)
    write_training(tmp_path, 2, "fft", "FFT", step_seconds=[1, 1, 1, 1], seed=0, **common)
    write_training(
        tmp_path, 3, "fft", "FFT", step_seconds=[1, 3, 3, 3], seed=1, result={"peak_memory_bytes": 7}, **common
    )
    ([entry], _) = found_in(tmp_path)
    assert entry.runs == ("002-fft", "003-fft")
    assert entry.tokens_per_second == pytest.approx((100 + 100 / 3) / 2)
    assert entry.peak_memory_bytes == 2_000_000_000


def test_states_are_in_the_order_of_the_papers_and_distinguished_by_stage(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "mask-train", "MFT", recipe="study", stage="mft", parents=["000-fft"])
    write_training(tmp_path, 2, "fft", "GMT", recipe="study", stage="gmt[ratio=0.2]")
    write_training(tmp_path, 3, "fft", "GMT", recipe="study", stage="gmt[ratio=0.4]")
    write_training(tmp_path, 4, "fft", "FFT", recipe="study", stage="fft")
    entries, _ = found_in(tmp_path)
    assert [entry.state for entry in entries] == ["FFT", "GMT (gmt[ratio=0.2])", "GMT (gmt[ratio=0.4])", "MFT"]


def test_trainings_without_timed_steps_are_not_listed(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "mask-train", "random mask", result={"steps": 0})
    write_training(tmp_path, 2, "fft", "FFT", status="interrupted")
    folder = write_training(tmp_path, 3, "fft", "FFT")
    lines = (folder / "metrics.jsonl").read_text("utf-8").replace("step_seconds", "seconds_of_old")
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    assert found_in(tmp_path) == ([], [])


def test_a_damaged_training_is_named_and_hides_no_other(tmp_path: Path) -> None:
    bad = write_training(tmp_path, 1, "fft", "FFT")
    (bad / "metrics.jsonl").write_text("{not json}\n", encoding="utf-8")
    write_training(tmp_path, 2, "mask-train", "MFT")
    write_training(tmp_path, 3, "fft", "GMT", result={"tokens": None})
    entries, problems = found_in(tmp_path)
    assert [entry.state for entry in entries] == ["MFT"]
    assert [problem.split(":")[0] for problem in problems] == [
        str(bad / "metrics.jsonl"),
        str(tmp_path / "003-fft" / "run.json"),
    ]


def test_an_operation_count_missing_for_some_seeds_is_left_out(tmp_path: Path) -> None:
    folder = write_training(tmp_path, 1, "fft", "FFT")
    text = (folder / "run.json").read_text("utf-8").replace('"flops_per_token": 6000, ', "")
    (folder / "run.json").write_text(text, encoding="utf-8")
    ([entry], _) = found_in(tmp_path)
    assert entry.flops is None
