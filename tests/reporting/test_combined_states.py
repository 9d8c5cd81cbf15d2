"""Averaged and interpolated models in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mftctl.experiments.run_folder import list_runs
from mftctl.progress import Silence
from mftctl.reporting.figures.training_histories import read_histories
from mftctl.reporting.report import make_report
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_runs import write_training


def write_combined(root: Path, number: int, command: str, parents: list[str], result: dict[str, Any]) -> str:
    """Writes a finished run that combined the models of other runs; returns its name."""
    name = f"{number:03d}-{command}"
    (root / name).mkdir(parents=True)
    inputs = {"model": "m", "mask": None, "state": "FFT", "parents": parents, "origin": "models/base"}
    inputs |= {"checkpoints": parents, "weights": None} if command == "average" else {}
    record = {"command": command, "status": "finished", "started": "", "config": {"seed": 0, "data": ["train.jsonl"]}}
    document = {**record, "inputs": inputs, "result": {"model": "made", **result}}
    (root / name / "run.json").write_text(json.dumps(document), encoding="utf-8")
    return name


def write_study(root: Path) -> None:
    """Two fine-tunings, their average, a model before the first, and evaluations of all models."""
    ffts = [write_training(root, number, "FFT", {0: 1.2, 10: 0.7}, stage=f"fft{number}") for number in (1, 2)]
    averaged = {"state": "averaged", "weights": [0.5, 0.5], "tensors_averaged": 1, "bytes_written": 1}
    average = write_combined(root, 3, "average", ffts, averaged)
    shares = {"share": 0.8, "best_loss": 0.65, "losses": [{"share": 0.8, "loss": 0.65}], "tensors": 1}
    interpolated = {"state": "interpolated", "base": "models/base", "peak_memory_bytes": 1, **shares}
    between = write_combined(root, 4, "interpolate", ffts[:1], interpolated)
    (root / between / "metrics.jsonl").write_text('{"step": 0, "share": 0.8, "eval_loss": 0.65}\n', encoding="utf-8")
    states: list[tuple[str, list[str], float]] = [
        ("pre-trained", [], 0.6),
        ("FFT", ffts[:1], 0.3),
        ("averaged", [*ffts, average], 0.2),
        ("interpolated", [ffts[0], between], 0.4),
    ]
    for number, (state, parents, loss) in enumerate(states, start=6):
        write_evaluation(root, number, state, parents, make_samples(number, loss=loss, correct=0.5))


def test_they_are_compared_with_the_fft_they_were_made_from(tmp_path: Path) -> None:
    write_study(tmp_path)
    report = make_report(tmp_path, Silence())
    # The hand-written record of the mask lacks what the figures of masks need.
    assert [problem for problem in report.problems if "005-mask-train" not in problem] == []
    table = next(table for table in report.tables if table.metric == "loss")
    assert [row.state for row in table.rows] == ["pre-trained", "FFT", "averaged", "interpolated"]
    changes = {row.state: row.change for row in table.rows}
    averaged, interpolated = changes["averaged"], changes["interpolated"]
    assert averaged is not None
    assert interpolated is not None
    assert (averaged.verdict, interpolated.verdict) == ("better", "worse")


def test_all_runs_behind_an_average_are_sources(tmp_path: Path) -> None:
    write_study(tmp_path)
    sources = {source.name: source for source in make_report(tmp_path, Silence()).sources}
    assert {"001-fft", "002-fft", "003-average", "004-interpolate"} <= set(sources)
    assert sources["003-average"].made == "makes averaged"
    assert sources["003-average"].reproduction.startswith("mftctl average 001-fft 002-fft ")
    assert sources["004-interpolate"].reproduction.startswith("mftctl interpolate --recipe ")


def test_a_mask_on_such_a_model_misses_no_training(tmp_path: Path) -> None:
    write_study(tmp_path)
    before: dict[str, Any] = {"parents": ["001-fft", "004-interpolate"], "before": "interpolated"}
    write_training(tmp_path, 5, "MFT", {0: 0.65, 4: 0.63}, command="mask-train", unmasked_loss=0.65, **before)
    histories, problems = read_histories(list_runs(tmp_path)[0])
    assert problems == []
    [mask] = [history for history in histories if history.state == "MFT"]
    assert mask.first_step == 10
