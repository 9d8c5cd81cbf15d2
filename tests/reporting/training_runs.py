"""Hand-written training and probe runs, as `run.json` and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_config import to_document

Scores = Mapping[int, float]


def write_training(
    root: Path,
    number: int,
    state: str,
    losses: Mapping[int, float],
    *,
    command: str = "fft",
    options: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
    before: str = "pre-trained",
    seed: int = 0,
    stage: str | None = None,
    recipe: str | None = "study",
    status: str = "finished",
    origin: str = "models/base",
    data: str = "train.jsonl",
    validation: str = "v1",
    unmasked_loss: float | None = None,
    scores: Mapping[str, Scores] | None = None,
    digest: str = "d1",
) -> str:
    """Writes a new `fft` or `mask-train` run with these validation losses and scores by step; returns its name.

    Without losses the run has trained nothing and measured nothing.
    """
    folder = root / f"{number:03d}-{command}"
    folder.mkdir(parents=True)
    section = {"fft": "fft", "mask-train": "mask_train"}[command]
    retained = {"retain_data": ["general.jsonl"]} if "retain_weight" in (options or {}) else {}
    recipe_of_run = Recipe.model_validate({"seed": seed, section: dict(options or {}), "data": [data], **retained})
    lines: list[dict[str, Any]] = [{"step": step, "eval_loss": loss, "epoch": 0} for step, loss in losses.items()]
    for metric, values in (scores or {}).items():
        for step, value in values.items():
            found = [{"name": metric, "value": value, "standard_error": 0.02, "samples": 100}]
            lines.append({"step": step, "dataset": "test.jsonl", "digest": digest, "metrics": found})
    result: dict[str, Any] = {}
    if status == "finished":
        result = {"state": state}
    if status == "finished" and losses:
        best = min(losses, key=lambda step: losses[step])
        result |= {"best_loss": losses[best], "best_step": best}
        result |= {} if unmasked_loss is None else {"unmasked_loss": unmasked_loss}
    record = {
        "command": command,
        "status": status,
        "started": "2025-01-01T00:00:00+00:00",
        "config": to_document(recipe_of_run),
        "recipe": recipe,
        "inputs": {
            "model": parents[-1] if parents else origin,
            "mask": None,
            "state": before,
            "parents": list(parents),
            "origin": origin,
            "digests": {"train": "t1", "validation": validation},
        },
        "result": result,
        "stage": stage,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    is_trained = command == "fft" or dict(options or {}).get("method", "learned") == "learned"
    if lines and is_trained:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder.name


def write_probe(
    root: Path,
    number: int,
    changes: Mapping[str, float],
    *,
    unmasked_loss: float = 0.5,
    groups: Sequence[int | str] | None = None,
    fast: bool = False,
    seed: int = 0,
    parents: Sequence[str] = ("001-fft",),
    state: str = "FFT",
    recommended: str | None = None,
    options: Mapping[str, Any] | None = None,
    agreement: Mapping[str, Any] | None = None,
    status: str = "finished",
    scores: Mapping[str, float] | None = None,
    by: str = "gsm8k",
    of_kinds: bool = False,
) -> str:
    """Writes a new `probe` run with these changes of the loss by group of layers or kind; returns its name."""
    folder = root / f"{number:03d}-probe"
    folder.mkdir(parents=True)
    probing: dict[str, Any] = {"fast": fast} | ({} if groups is None else {"groups": list(groups)})
    recipe = Recipe.model_validate({"seed": seed, "probe": probing, "mask_train": dict(options or {})})
    found = [
        {"layers": "0-3", "projection": name, "size": 4, "weights": 8, "change": change}
        if of_kinds
        else {"layers": name, "size": layer_count(name), "change": change}
        for name, change in changes.items()
    ]
    if not fast:
        trained = {"start_loss": unmasked_loss, "best_step": 1, "steps": 2}
        found = [{**group, **trained, "best_loss": unmasked_loss + group["change"]} for group in found]  # type: ignore[operator]
    result: dict[str, Any] = {
        "groups": sorted(found, key=lambda group: group["change"]),
        "recommended_layers": recommended or min(changes, key=lambda layers: changes[layers]),
    }
    if of_kinds:
        result |= {"recommended_layers": "0-3", "recommended_projection": result["recommended_layers"]}
    agreement = None if agreement is None else {"groups": len(changes), **agreement}
    result |= {"fast": True, "agreement": agreement} if fast else {"unmasked_loss": unmasked_loss}
    if scores is not None:
        found = [{**group, "score_change": scores[str(group["layers"])]} for group in found]
        metric = by if by == "exact_match" else "exact_match,strict-match"
        score = {"metric": metric, "value": 0.25, "standard_error": 0.05, "samples": 80}
        result |= {"by": by, "unmasked_score": score, "groups": found}
    record = {
        "command": "probe",
        "status": status,
        "started": "2025-01-01T00:00:00+00:00",
        "config": to_document(recipe),
        "inputs": {"model": "m", "state": state, "parents": list(parents), "origin": "models/base"},
        "result": result if status == "finished" else {},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder.name


def write_structure_probe(
    root: Path, number: int, unit: str, changes: Mapping[int, Sequence[float]], *, seed: int = 0
) -> Path:
    """Writes a new `probe --fast --unit head|neuron` run with these predicted changes by layer; returns its folder."""
    folder = root / f"{number:03d}-probe"
    folder.mkdir(parents=True)
    rows = [(layer, index, change) for layer, values in changes.items() for index, change in enumerate(values)]
    lines = ["layer,index,change", *(f"{layer},{index},{change!r}" for layer, index, change in rows)]
    (folder / f"{unit}s.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe.model_validate({"seed": seed, "probe": {"fast": True, "unit": unit}})
    result = {
        "fast": True,
        "unit": unit,
        "file": f"{unit}s.csv",
        "units": len(rows),
        "change": sum(change for _, _, change in rows),
        "best_units": 1,
        "best_share": 0.25,
        "layers": [
            {"layer": layer, "units": len(values), "change": sum(values), "best": 0, "best_share": 0.0}
            for layer, values in changes.items()
        ],
        "best": [],
    }
    record = {
        "command": "probe",
        "status": "finished",
        "started": "2025-01-01T00:00:00+00:00",
        "config": to_document(recipe),
        "inputs": {"model": f"m{seed}", "state": "FFT", "parents": [f"{seed}-fft"], "origin": "models/base"},
        "result": result,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def layer_count(layers: str) -> int:
    """Number of layers in a selection such as `0,3,8-11`."""
    ends = [part.split("-") for part in layers.split(",")]
    return sum(int(pair[-1]) - int(pair[0]) + 1 for pair in ends)
