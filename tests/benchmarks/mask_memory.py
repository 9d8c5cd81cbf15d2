"""Memory of mask training beyond the frozen model, in bytes per masked weight, measured from outside.

python -m tests.benchmarks.mask_memory --repetitions 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import create_run
from mftctl.progress import Silence
from mftctl.runtime.process_group import import_deepspeed
from mftctl.workflows.mask_train import mask_train
from tests.benchmarks.timings import spread
from tests.conftest import build_tokenizer
from tests.workflow_fixtures import write_additions


class _AtTheStart(Silence):
    """Records the memory held once the model is loaded and before any scores exist."""

    resident_bytes = 0

    def note(self, text: str) -> None:
        if text.startswith("Learning rate"):
            self.resident_bytes = _memory_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def make_inputs(folder: Path, *, hidden_size: int, layers: int) -> None:
    """Builds a model with large projections and a small vocabulary, and short records so activations are negligible."""
    config = LlamaConfig(
        vocab_size=102,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    import_deepspeed()  # saving a model imports it where installed, and it logs to stdout
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_additions(folder / "train.jsonl", 12, seed=1)
    write_additions(folder / "val.jsonl", 4, seed=2)


def train(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes per masked weight beyond the frozen model, and the number of masked weights, in this process."""
    recipe = parse_recipe(
        {
            "model": str(folder / "model"),
            "data": [str(folder / "train.jsonl")],
            "val_data": [str(folder / "val.jsonl")],
            "mask_train": {"layers": "all", "max_steps": 4, "batch_size": 2, "val_steps": 2, **options},
        }
    )
    listener = _AtTheStart()
    with tempfile.TemporaryDirectory(dir=folder) as root:
        run = create_run(
            Path(root), "mask-train", to_document(recipe), inputs=ModelSource(str(recipe.model)).as_inputs()
        )
        result = mask_train(recipe, ModelSource(str(recipe.model)), run, listener).document()
    peak_bytes = _memory_bytes("VmHWM") - listener.resident_bytes
    return {"bytes_a_weight": peak_bytes / result["weights"], "weights": result["weights"]}


def compare(
    folder: Path, ways: dict[str, dict[str, Any]], *, hidden_size: int, layers: int, repetitions: int
) -> dict[str, str]:
    """Bytes per masked weight for each variant, as minimum, median and maximum, each measured in its own process."""
    make_inputs(folder, hidden_size=hidden_size, layers=layers)
    # Freed blocks are returned to the system, so that the peak counts only memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, options in ways.items():
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.mask_memory",
                "--child",
                str(folder),
                json.dumps(options),
            ]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout)["bytes_a_weight"])
    return {f"{name}, bytes a masked weight": spread(values) for name, values in found.items()}


def main() -> None:
    """Prints the comparison for a model of 67 million masked weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(Path(options.child[0]), json.loads(options.child[1]))))
        return
    ways: dict[str, dict[str, Any]] = {
        "default": {},
        "paper": {"preset": "paper"},
        "low memory": {"low_memory": True},
        "low memory, paper": {"low_memory": True, "preset": "paper"},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), ways, hidden_size=512, layers=16, repetitions=options.repetitions)
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
