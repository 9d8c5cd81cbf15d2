"""Small workflow inputs: a tiny model, addition problems to learn, and a listener that can press Ctrl-C."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import EncodedRecords, Encoder, encode_all
from mftctl.data.examples import Example
from mftctl.data.record_issues import RecordIssues
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.progress import Progress, Silence
from tests.conftest import build_llama, build_tokenizer


def write_additions(path: Path, count: int, seed: int) -> Path:
    """Writes records such as `12+30?` / `#### 42`, one per line."""
    generator = random.Random(seed)
    pairs = [(generator.randint(0, 50), generator.randint(0, 50)) for _ in range(count)]
    records = [{"question": f"{a}+{b}?" + " " * (a % 7), "answer": f"{a}+{b}\n#### {a + b}"} for a, b in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_workspace(folder: Path) -> Path:
    """Creates a folder with `tiny/` (a Llama of 4 layers), `train.jsonl`, `val.jsonl` and `test.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_llama().save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    write_additions(folder / "train.jsonl", 48, seed=1)
    write_additions(folder / "val.jsonl", 12, seed=2)
    write_additions(folder / "test.jsonl", 16, seed=3)
    return folder


def make_recipe(workspace: Path, **changes: Any) -> Recipe:
    """A recipe for the workspace: 12 optimizer steps, with validation every 4 steps."""
    training = {"max_steps": 12, "batch_size": 4, "val_steps": 4}
    document: dict[str, Any] = {
        "model": str(workspace / "tiny"),
        "data": [str(workspace / "train.jsonl")],
        "val_data": [str(workspace / "val.jsonl")],
        "test_data": [str(workspace / "test.jsonl")],
        "fft": {**training, "learning_rate": 3e-3},
        "probe": {"groups": [2], "data_fraction": 0.5},
        "mask_train": {**training, "layers": "1-2", "preset": "paper"},
    }
    for key, value in changes.items():
        place: dict[str, Any] = document
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return parse_recipe(document)


def encode_records(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length_tokens: int = 1024
) -> EncodedRecords:
    """All records as tokens; none of them is left out."""
    issues = RecordIssues()
    encoded = encode_all(examples, Encoder(tokenizer), max_length_tokens, issues)
    issues.settle("error")
    assert len(encoded.records) == len(examples)
    return encoded


def open_run(root: Path, command: str, recipe: Recipe) -> tuple[Run, ModelSource]:
    """A new run of a command on the recipe's model."""
    source = ModelSource(str(recipe.model))
    return create_run(root, command, to_document(recipe), inputs=source.as_inputs()), source


def tuned(workspace: Path, root: Path, **changes: Any) -> Run:
    """A finished `fft` run with a recipe for the workspace."""
    from mftctl.workflows.fft import fine_tune

    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    return run


class Interrupter:
    """A listener that raises SIGINT, as Ctrl-C does, when training reaches a step; counts completed validations."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.notes: list[str] = []
        self.validations = 0

    def progress(self, state: Progress) -> None:
        self.validations += state.task == "validating" and state.done == state.total
        if state.task == "training" and state.done == self.step:
            self.step = -1
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)
