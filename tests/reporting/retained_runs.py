"""Hand-written runs that are measured on test data and on data to retain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_runs import write_training

DELTA = {"kind": "delta", "layers": "all"}
DROP = {"method": "drop", "strategy": "random"}
RATIOS = (0.3, 0.5, 0.7)


def add_retained(evaluation: Path, loss: float, *, seed: int = 1, digest: str = "r1", samples: int = 40) -> None:
    """Adds the dataset `retained` with its samples file to a finished evaluation."""
    rows = make_samples(seed, loss=loss, correct=0.5, samples=samples)
    nll, tokens, _ = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    value = float(nll.sum() / tokens.sum())
    metric = {"name": "loss", "value": value, "standard_error": 0.01, "samples": samples}
    measured = {"name": "retained", "digest": digest, "samples": "retained-samples.jsonl", "metrics": [metric]}
    path = evaluation / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["result"]["datasets"].append(measured)
    path.write_text(json.dumps(record), encoding="utf-8")
    lines = [
        {"id": str(number), "scores": {"loss": one}, "weights": {"loss": count}}
        for number, (one, count, _) in enumerate(rows)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (evaluation / "retained-samples.jsonl").write_text(text, encoding="utf-8")


class RetainedStudy:
    """States with their evaluations on both domains, numbered as they are added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0

    def add(
        self,
        state: str,
        loss: float,
        retained: float | None,
        *,
        options: Mapping[str, Any] | None = None,
        on: Sequence[str] = (),
        stage: str,
        seed: int = 0,
    ) -> str:
        """Writes the run that makes a state and its evaluation; returns the name of the first."""
        self._number += 2
        command = "mask-train" if on else "fft"
        parents: list[str] = []
        if state != "pre-trained":
            made = write_training(
                self.root, self._number - 1, state, {}, command=command, options=options, parents=on, seed=seed,
                stage=stage, before="FFT" if on else "pre-trained",
            )  # fmt: skip
            parents = [*on, made]
        samples = make_samples(self._number, loss=loss, correct=0.5)
        evaluation = write_evaluation(
            self.root, self._number, state, parents, samples, stage=stage, seed=seed, recipe="study"
        )
        if retained is not None:
            add_retained(evaluation, retained, seed=self._number)
        return parents[-1] if parents else ""

    def interpolate(
        self, losses: Mapping[float, tuple[float, float | None]], *, digest: str = "r1", seed: int = 0
    ) -> str:
        """Writes an `interpolate` run with the validation loss and the retained loss at each share."""
        self._number += 1
        folder = self.root / f"{self._number:03d}-interpolate"
        folder.mkdir(parents=True)
        entries: list[dict[str, Any]] = [
            {"share": share, "loss": loss} | ({} if kept is None else {"retained_loss": kept})
            for share, (loss, kept) in losses.items()
        ]
        result = {
            "state": "interpolated", "model": "m", "base": "models/base", "share": 1.0, "best_loss": 0.3,
            "losses": entries, "tensors": 3, "peak_memory_bytes": 1,
        }  # fmt: skip
        inputs = {
            "model": "m", "mask": None, "state": "FFT", "parents": [], "origin": "models/base",
            "digests": {"retained": digest},
        }  # fmt: skip
        record = {
            "command": "interpolate", "status": "finished", "started": "2025-01-01T00:00:00+00:00",
            "config": {"seed": seed, "data": ["train.jsonl"]}, "recipe": "study", "stage": "between",
            "inputs": inputs, "result": result,
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return folder.name


def write_retained_study(root: Path) -> RetainedStudy:
    """Base, FFT, LoRA, random drops, delta masks with and without training on data to retain, and interpolation."""
    study = RetainedStudy(root)
    study.add("pre-trained", 1.9, 0.3, stage="base")
    fft = study.add("FFT", 0.30, 0.9, stage="fft")
    study.add("LoRA", 0.42, 0.6, options={"method": "lora"}, stage="lora")
    for place, ratio in enumerate(RATIOS):
        stage = f"[ratio={ratio}]"
        drop = {**DROP, "ratio": ratio}
        study.add("random drop", 0.34 + 0.06 * place, 0.8 - 0.05 * place, options=drop, on=[fft], stage=f"drop{stage}")
        delta = {**DELTA, "ratio": ratio}
        study.add("MFT delta", 0.25 + 0.02 * place, 0.85 - 0.1 * place, options=delta, on=[fft], stage=f"delta{stage}")
        kept = {**delta, "retain_weight": 1.0}
        study.add("MFT delta", 0.26 + 0.02 * place, 0.7 - 0.1 * place, options=kept, on=[fft], stage=f"kept{stage}")
    study.interpolate({0.0: (1.9, 0.3), 0.5: (0.6, 0.5), 1.0: (0.31, 0.9)})
    return study
