"""Hand-written evaluation runs, as `run.json` and a samples file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mftctl.experiments.run_folder import list_runs
from mftctl.progress import Silence
from mftctl.reporting.state_tables import MetricTable, metric_tables

# One sample: loss summed over the answer, number of answer tokens, exact match.
Sample = tuple[float, int, float]


def make_samples(seed: int, *, loss: float, correct: float, noise: float = 0.05, samples: int = 60) -> list[Sample]:
    """Samples with a common difficulty; `loss` and `correct` shift all of them, and `seed` determines the noise."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    tokens = common.integers(2, 12, samples)
    difficulty = common.uniform(0, 1, samples)
    nll = tokens * (loss + difficulty + noise * own.standard_normal(samples))
    right = difficulty + noise * own.standard_normal(samples) < correct
    return [(float(n), int(t), float(r)) for n, t, r in zip(nll, tokens, right, strict=True)]


def write_evaluation(
    root: Path,
    number: int,
    state: str,
    parents: Sequence[str],
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    stage: str | None = None,
    digest: str = "d1",
    status: str = "finished",
    origin: str = "models/base",
    recipe: str | None = None,
    data: str = "train.jsonl",
    task: str | None = None,
    decides: dict[str, object] | None = None,
) -> Path:
    """Writes a new `eval` run with loss and exact match on `test.jsonl` or on a benchmark; returns its folder."""
    folder = root / f"{number:03d}-eval"
    folder.mkdir(parents=True)
    nll, tokens, right = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    metrics = [
        {"name": "loss", "value": float(nll.sum() / tokens.sum()), "standard_error": 0.01, "samples": len(samples)},
        {"name": "exact_match", "value": float(right.mean()), "standard_error": None, "samples": len(samples)},
    ]
    name = {"name": "test.jsonl"} if task is None else {"name": task, "task": task}
    measured = {**name, "digest": digest, "samples": "samples.jsonl", "metrics": metrics}
    record = {
        "command": "eval",
        "status": status,
        "started": "2025-01-01T00:00:00+00:00",
        "config": {"seed": seed, "data": [data]},
        "recipe": recipe,
        "inputs": {"model": "m", "mask": None, "state": state, "parents": list(parents), "origin": origin},
        "result": {"state": state, "datasets": [measured]} if status == "finished" else {},
        "stage": stage,
        "decides": decides or {},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [
        {"id": str(index), "scores": {"loss": loss, "exact_match": match}, "weights": {"loss": count}}
        for index, (loss, count, match) in enumerate(samples)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_experiment(root: Path) -> None:
    """Writes two seeds of pre-trained, FFT, continued FFT, random mask and MFT, named as by `mftctl run`."""
    for seed in (0, 1):
        first = 1 + 10 * seed
        fft = f"{first:03d}-fft"
        states = [
            ("pre-trained", "base", [], {"loss": 0.6, "correct": 0.2}),
            ("FFT", "fft", [fft], {"loss": 0.3, "correct": 0.5}),
            ("continued FFT", "more", [fft, f"{first + 1:03d}-fft"], {"loss": 0.34, "correct": 0.5}),
            ("random mask", "random", [fft, f"{first + 2:03d}-mask-train"], {"loss": 0.3, "correct": 0.3}),
            ("MFT", "mft", [fft, f"{first + 3:03d}-mask-train"], {"loss": 0.25, "correct": 0.7}),
        ]
        for offset, (state, stage, parents, level) in enumerate(states):
            samples = make_samples(10 * seed + offset + 1, **level)
            write_evaluation(root, first + 4 + offset, state, parents, samples, seed=seed, stage=stage)


def compare_runs(root: Path) -> tuple[list[MetricTable], list[str]]:
    """The tables of a runs folder, and one line per unusable run."""
    runs, errors = list_runs(root)
    tables, problems = metric_tables(runs, Silence())
    return tables, [*(f"{error.path}: {error.message}" for error in errors), *problems]
