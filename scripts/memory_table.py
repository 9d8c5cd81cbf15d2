"""Writes docs/memory.md: the GPU memory that each command needs, computed by the planning code.

    python scripts/memory_table.py

Needs no GPU and no weights; takes a few minutes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.workflows.planning.batches import assumed_batches
from mftctl.workflows.planning.command_memory import Asked, CommandMemory
from mftctl.workflows.planning.evaluation_memory import Generation
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.planned_device import asked_device
from mftctl.workflows.planning.room import Verdict, judge

PATH = Path(__file__).parent.parent / "docs" / "memory.md"
SIZES_GB = (24, 40, 80, 141)
LENGTH_TOKENS = 1024
COMMANDS = {
    "fft": ("fft", {}),
    "fft --method lora": ("fft", {"fft": {"method": "lora"}}),
    "probe": ("probe", {}),
    "probe --fast": ("probe", {"probe": {"fast": True}}),
    "mask-train --layers all": ("mask-train", {"mask_train": {"layers": "all"}}),
    "eval": ("eval", {}),
}
HEAD = f"""# Memory on one GPU

**Estimates, not measured on a GPU.** Written by `scripts/memory_table.py` from the planning code that `mftctl validate`
and the commands themselves use; `tests/workflows/planning/test_memory_table.py` compares.

Models of the shapes of Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, and Llama 2 13B, with the default options and batches
of 8 records of {LENGTH_TOKENS:,} tokens that are learned whole, which is the most there can be. `eval` answers one
question of {LENGTH_TOKENS:,} tokens with as many. Of the memory named, 0.5 GB are CUDA's own, and 5 % are left free.

*yes*: as it is. Otherwise the smallest set of options with which it fits; *no*: none is enough. Of `probe` and
`mask-train`, fewer layers are named last.

`mftctl validate RECIPE --device-memory 80GB` tells the same of your own model, data and options.
"""


def models() -> dict[str, LlamaConfig]:
    """The table's models by size."""
    shapes = {
        "1B": (2048, 8192, 16, 32, 8, 64, 128_256, True),
        "3B": (3072, 8192, 28, 24, 8, 128, 128_256, True),
        "8B": (4096, 14_336, 32, 32, 8, 128, 128_256, False),
        "13B": (5120, 13_824, 40, 40, 40, 128, 32_000, False),
        "70B": (8192, 28_672, 80, 64, 8, 128, 128_256, False),
    }
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
    )
    return {
        name: LlamaConfig(**dict(zip(names, shape, strict=True)), dtype=torch.bfloat16, max_position_embeddings=8192)
        for name, shape in shapes.items()
    }


def row(config: LlamaConfig, label: str, known: dict[Hashable, MemoryEstimate]) -> list[str]:
    """Table cells for a command and model: the memory needed, and the options to use on each GPU.

    Args:
        config: Model configuration.
        label: Label of the command in `COMMANDS`.
        known: Estimates made earlier.
    """
    command, document = COMMANDS[label]
    recipe = parse_recipe(document)
    asked = Asked(assumed_batches(1, LENGTH_TOKENS), Generation(LENGTH_TOKENS, LENGTH_TOKENS))
    cells: list[str] = []
    for size in SIZES_GB:
        device = asked_device("cuda", size * 10**9)
        memory = CommandMemory(command, config, config.num_hidden_layers, device, asked=asked, known=known)
        cells = cells or [f"{memory.estimate(recipe).peak_bytes / 1e9:.1f} GB"]
        cells.append(_cell(memory, recipe, device.free_bytes or 0))
    return cells


def _cell(memory: CommandMemory, recipe: Recipe, free_bytes: int) -> str:
    if judge(memory.estimate(recipe).peak_bytes, free_bytes) is Verdict.FITS:
        return "yes"
    found = memory.smaller(recipe, free_bytes)
    return "no" if found is None else f"`{found.flags}`"


def lines(names: Iterator[str] | list[str]) -> list[str]:
    """The table lines for the given models.

    Args:
        names: Names of the models.
    """
    head = ["model", "command", "as it is", *(f"{size} GB" for size in SIZES_GB)]
    written = [_line(head), _line(["---"] * len(head))]
    for name in names:
        known: dict[Hashable, MemoryEstimate] = {}
        written += [_line([name, f"`{label}`", *row(models()[name], label, known)]) for label in COMMANDS]
    return written


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(HEAD + "\n" + "\n".join(lines(list(models()))) + "\n", encoding="utf-8")
