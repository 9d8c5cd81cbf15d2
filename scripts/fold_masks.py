"""Votes masks of several folds onto one model: do records that a model has not seen help to mask it?

    python scripts/fold_masks.py --output folds
    python scripts/fold_masks.py --output decayed --weight-decay 1 --learning-rate 2e-3 --mask-learning-rate 2e-3

Fine-tunes the built-in model on all training records of the quickstart with averaged weights, and once without each
fold. Each of these models is masked with the records of its own fold, which it has not seen. Weights that enough of
these masks remove are removed from the model of all records; validation decides how many are enough. Finished parts are
kept, so that the script can be run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mftctl import Recipe, evaluate, fine_tune, learn_mask, load_recipe
from mftctl.data.prepared.load import load_examples
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import list_runs
from mftctl.masking.checkpoints.tensors import WEIGHTS_FILE
from mftctl.masking.mask import load_mask

FOLDS = 5
MASK_EPOCHS = 5.0
VALIDATION, TEST = "quickstart/validation", "quickstart/test"


@dataclass(frozen=True)
class Study:
    """The study of one seed.

    Attributes:
        folder: Folder for everything.
        seed: Seed of the folds and of all trainings.
        settings: Recipe keys of the fine-tunings.
        mask_learning_rate: Rate of the scores.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    mask_learning_rate: float

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the strong fine-tuning, without its stages."""
        return with_changes(
            load_recipe("quickstart/strong"), {"seed": self.seed, "seeds": [], "stages": {}, "controls": []}
        )

    @cached_property
    def records(self) -> list[str]:
        """The training records as JSON lines, shuffled."""
        lines = [
            json.dumps({"prompt": example.messages[0].content, "completion": example.answer}) + "\n"
            for example in load_examples(self.recipe.data)
        ]
        random.Random(self.seed).shuffle(lines)
        return lines

    def file_of(self, name: str, records: list[str]) -> str:
        """Writes records to a file; returns its path."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(records), encoding="utf-8")
        return str(path)

    def tuned(self, name: str, records: list[str]) -> Path:
        """The model fine-tuned on these records."""
        runs = self.folder / f"fft-{name}"
        finished = [run for run in (list_runs(runs)[0] if runs.is_dir() else []) if run.record.status == "finished"]
        if finished:
            return finished[-1].folder / "model"
        recipe = with_changes(self.recipe, {"data": [self.file_of(name, records)], **self.settings})
        return Path(fine_tune(recipe, runs=runs).result.model)

    def votes(self) -> dict[str, torch.Tensor]:
        """For each masked weight, how many of the folds' masks remove it, int8."""
        total: dict[str, torch.Tensor] = {}
        for fold in range(FOLDS):
            unseen = self.records[fold::FOLDS]
            others = [line for place, line in enumerate(self.records) if place % FOLDS != fold]
            model = self.tuned(f"without-{fold}", others)
            path = self.folder / f"fold-{fold}.bits"
            if not path.is_file():
                changes = {
                    "model": str(model),
                    "data": [self.file_of(f"fold-{fold}", unseen)],
                    "mask_train.learning_rate": self.mask_learning_rate,
                    "mask_train.epochs": MASK_EPOCHS,
                    "mask_train.learn_from": "all",
                }
                learn_mask(with_changes(self.recipe, changes), output=path, runs=self.folder / "masks")
            mask = load_mask(path)
            for name in mask.names():
                removed = (~mask[name].bool()).to(torch.int8)
                total[name] = total[name] + removed if name in total else removed
        return total

    def loss(self, model: Path, data: str) -> float:
        """The loss of a model on test or validation problems."""
        recipe = with_changes(self.recipe, {"model": str(model), "test_data": [data], "eval.generate": False})
        return evaluate(recipe, runs=self.folder / "evals").result.datasets[0].metrics[0].value


def write_masked(model: Path, votes: dict[str, torch.Tensor], enough: int, output: Path) -> int:
    """Writes the model without the weights that enough masks remove; returns their number."""
    weights, removed = load_file(model / WEIGHTS_FILE), 0
    for name, count in votes.items():
        weights[name] = weights[name].masked_fill(count >= enough, 0)
        removed += int((count >= enough).sum())
    shutil.copytree(model, output, dirs_exist_ok=True)
    save_file(weights, output / WEIGHTS_FILE, {"format": "pt"})
    return removed


def main() -> None:
    """Runs the study of a seed and prints its losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--mask-learning-rate", type=float, default=6e-3)
    options = parser.parse_args()
    settings = {
        "fft.schedule": "constant",
        "fft.average": "ema",
        "fft.average_horizons": [0.1, 0.2, 0.3],
        "fft.learning_rate": options.learning_rate,
        "fft.weight_decay": options.weight_decay,
    }
    folder = options.output / f"seed-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder, options.seed, settings, options.mask_learning_rate)
    whole = study.tuned("whole", study.records)
    votes = study.votes()
    best, best_loss = whole, study.loss(whole, VALIDATION)
    print(f"no mask: validation {best_loss:.4f}", flush=True)
    for enough in range(1, FOLDS + 1):
        model = folder / f"masked-{enough}"
        removed = write_masked(whole, votes, enough, model)
        loss = study.loss(model, VALIDATION)
        print(f"removed by {enough} of {FOLDS} masks: {removed} weights, validation {loss:.4f}", flush=True)
        if loss < best_loss:
            best, best_loss = model, loss
    print(f"test: {study.loss(whole, TEST):.4f} without a mask, {study.loss(best, TEST):.4f} with {best.name}")


if __name__ == "__main__":
    main()
