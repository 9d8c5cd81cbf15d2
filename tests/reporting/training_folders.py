"""Hand-written training runs, as `run.json` and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_training(
    root: Path,
    number: int,
    command: str,
    state: str,
    *,
    step_seconds: Sequence[float] = (9.0, 1.0, 1.0, 2.0),
    tokens_a_step: int = 100,
    seed: int = 0,
    stage: str | None = None,
    recipe: str | None = None,
    status: str = "finished",
    origin: str = "models/base",
    parents: Sequence[str] = (),
    result: Mapping[str, Any] | None = None,
    error: str | None = None,
    fft: Mapping[str, Any] | None = None,
    data: str = "train.jsonl",
) -> Path:
    """Writes a new training run of one epoch, with 2 records and 100 tokens per step and a validation at its end."""
    folder = root / f"{number:03d}-{command}"
    folder.mkdir(parents=True)
    steps = len(step_seconds)
    made = {
        "state": state,
        "model": str(folder / "model"),
        "steps": steps,
        "best_step": steps,
        "best_loss": 1.0,
        "tokens": steps * tokens_a_step,
        "flops_per_token": 6_000,
        "peak_memory_bytes": 2_000_000_000,
        **(result or {}),
    }
    record = {
        "command": command,
        "status": status,
        "started": "2025-01-01T00:00:00+00:00",
        "config": {"seed": seed, "data": [data], "fft": {**(fft or {})}, "mask_train": {}},
        "recipe": recipe,
        "stage": stage,
        "decides": {"data": [data], "fft": {**fft}} if fft is not None else {},
        "inputs": {
            "model": origin,
            "origin": origin,
            "parents": list(parents),
            "state": "FFT" if parents else "pre-trained",
            "train_records": 2 * steps,
            "digests": {"train": "t", "validation": "v"},
        },
        "result": made if status == "finished" else {},
        "seconds": 20.0,
        "error": error,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 2.0 - 0.1 * step,
            "epoch": step / steps,
            "num_input_tokens_seen": step * tokens_a_step,
            "step_seconds": seconds,
        }
        for step, seconds in enumerate(step_seconds, start=1)
    ]
    lines = [{"step": 0, "eval_loss": 2.0, "epoch": 0}, *lines, {"step": steps, "eval_loss": 1.0, "epoch": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_study(root: Path) -> None:
    """Writes the two seeds of `write_experiment` with the trainings of their states."""
    from tests.reporting.run_folders import write_experiment

    write_experiment(root)
    for seed in (0, 1):
        first = 1 + 10 * seed
        fft = f"{first:03d}-fft"
        write_training(root, first, "fft", "FFT", seed=seed, stage="fft")
        write_training(root, first + 1, "fft", "continued FFT", seed=seed, stage="more", parents=[fft])
        write_training(root, first + 2, "mask-train", "random mask", seed=seed, parents=[fft], result={"steps": 0})
        write_training(root, first + 3, "mask-train", "MFT", seed=seed, stage="mft", parents=[fft])
