"""Measures the peak memory of trainings, one after the other in its own process; used by the test next to it.

Start the process with MALLOC_MMAP_THRESHOLD_=131072: glibc then returns every large tensor to the system,
so that one training leaves nothing to the next, and only requested memory is measured.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mftctl.experiments.recipe import Recipe
from mftctl.progress import Silence
from mftctl.runtime.process_group import import_deepspeed
from mftctl.workflows import fft, mask_train
from mftctl.workflows.planning.memory import resident_bytes
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import make_recipe, open_run


@dataclass(frozen=True)
class Case:
    """A training to measure: 2 optimizer steps and the validations around them."""

    command: str
    model: dict[str, int]
    records: int
    record_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


def make_case(folder: Path, case: Case) -> Recipe:
    """The recipe of a case, with its model and data in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    import_deepspeed()  # saving a model imports it where installed, and it logs to stdout
    build_llama(**case.model).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    half = case.record_tokens // 2
    records = [{"question": "q" * (half - 4 - number % 3), "answer": "a" * half} for number in range(2 * case.records)]
    for name in ("train", "val", "test"):
        text = "".join(json.dumps(record) + "\n" for record in records[: None if name == "train" else 4])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    section = "fft" if case.command == "fft" else "mask_train"
    options = {"max_steps": 2, "val_steps": 2, "batch_size": case.records, **case.options}
    if options.get("kind") == "delta":
        build_llama(**case.model, seed=1).save_pretrained(folder / "base")
        options["base"] = str(folder / "base")
    changes: dict[str, Any] = {f"{section}__{key}": value for key, value in options.items()}
    if "retain_weight" in options:
        others = [{"question": f"{number:02}" + "r" * (half - 6), "answer": "b" * half} for number in range(24)]
        (folder / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in others), encoding="utf-8")
        changes["retain_data"] = [str(folder / "other.jsonl")]
    return make_recipe(folder, mask_train__layers="0-1", **changes)


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Resident bytes before a training and at its peak."""
    recipe = make_case(folder, case)
    run, source = open_run(folder / "runs", case.command, recipe)
    gc.collect()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    train = fft.fine_tune if case.command == "fft" else mask_train.mask_train
    train(recipe, source, run, Silence())
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"process_bytes": before, "peak_bytes": int(peak.split()[1]) * 1024}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        measure(Case("fft", {}, 2, 20), Path(place) / "first")  # triggers the lazy imports of the libraries
        cases = [Case(**case) for case in json.loads(sys.argv[1])]
        found = [measure(case, Path(place) / str(number)) for number, case in enumerate(cases)]
        sys.stdout.write(json.dumps(found))
