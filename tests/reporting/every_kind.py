"""A small runs folder with one run of every kind that a report reads, for tests that repeat often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.reporting.figures.test_surface import write_surface
from tests.reporting.mask_runs import make_mask, random_keep, write_mask_run
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_folders import write_training as write_timed_training
from tests.reporting.training_runs import write_probe, write_training

_SAMPLES = 8


def write_every_kind(
    root: Path, *, stage: str = "stage", data: str = "train.jsonl", dataset: str | None = None
) -> None:
    """Writes trainings with evaluations, including two of a sweep, probes, masks and a loss surface.

    Args:
        root: The runs folder.
        stage: Stage of the swept masks, shown to distinguish them.
        data: Name of the training data.
        dataset: Name of the test data; None for `test.jsonl`.
    """
    write_timed_training(root, 1, "fft", "FFT", stage="fft", recipe="study")
    write_training(root, 2, "continued FFT", {0: 0.8, 10: 0.9}, parents=["001-fft"], before="FFT", data=data)
    on_fft: dict[str, Any] = {"command": "mask-train", "parents": ["001-fft"], "before": "FFT", "unmasked_loss": 1.0}
    for number, ratio in ((3, 0.1), (4, 0.2)):
        options = {"ratio": ratio}
        scores = {"exact_match": {0: 0.1, 4: 0.2}}
        name = f"{stage}[ratio={ratio}]"
        write_training(root, number, "MFT", {0: 1.0, 4: 0.9}, options=options, scores=scores, stage=name, **on_fft)
    measured = [("pre-trained", []), ("FFT", ["001-fft"]), ("continued FFT", ["001-fft", "002-fft"])]
    measured += [("MFT", ["001-fft", "003-mask-train"]), ("MFT", ["001-fft", "004-mask-train", "030-apply"])]
    for number, (state, parents) in enumerate(measured, start=5):
        samples = make_samples(number, loss=0.3, correct=0.5, samples=_SAMPLES)
        name = None if len(parents) < 2 else ("", "", "more", f"{stage}[ratio=0.1]", f"{stage}[ratio=0.2]")[number - 5]
        folder = write_evaluation(root, number, state, parents, samples, stage=name, recipe="study", data=data)
        _rename_data(folder, dataset)
    write_probe(root, 10, {"0-3": 0.1, "4-7": -0.2})
    write_probe(
        root, 11, {"0-3": -0.1, "4-7": -0.2}, fast=True, agreement={"run": "010-probe", "rank_correlation": 1.0}
    )
    shapes: dict[str, tuple[int, ...]] = {f"model__layers__{n}__mlp__up_proj__weight": (8, 4) for n in (0, 1)}
    for number, seed in ((12, 0), (13, 1)):
        write_mask_run(root, number, "random mask", make_mask(random_keep(seed, **shapes)), seed=seed)
    write_surface(root, side=4, mask="003-mask-train")
    apply = {"model": "m", "mask": "mask.bits", "state": "MFT", "parents": ["001-fft", "004-mask-train"], "origin": "o"}
    record = {"command": "apply", "status": "finished", "started": "", "config": {"seed": 0}, "inputs": apply}
    (root / "030-apply").mkdir()
    record["result"] = {"state": "MFT", "model": "better", "base": "m"}
    (root / "030-apply" / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _rename_data(folder: Path, dataset: str | None) -> None:
    if dataset is not None:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record["result"]["datasets"][0]["name"] = dataset
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
