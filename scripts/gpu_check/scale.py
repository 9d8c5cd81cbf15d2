"""Sizes of the steps for an 80 GB GPU and for a rehearsal on two CPU cores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GPU_TESTS = (
    "tests/masking/test_selection.py",
    "tests/masking/test_layers.py",
    "tests/masking/checkpoints/test_apply_in_memory.py",
    "tests/training/test_prefix_cache.py",
    "tests/training/updates",
    "tests/training/updates/test_stochastic_adamw.py",
    "tests/training/test_learn_mask.py",
    "tests/training/test_held_out.py",
    "tests/workflows/test_mask_train.py",
    "tests/workflows/test_fft.py",
    "tests/training/updates/test_update_methods.py",
)
"""Tests of masking, selection, tuning, mask training and fine-tuning."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape; the weights are random."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192

    def settings(self) -> dict[str, Any]:
        """The settings of `LlamaConfig`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all steps.

    Attributes:
        rehearses: Whether this is a rehearsal, which emulates the GPU.
        small: Model to fine-tune.
        large: Model to mask, and to fine-tune with low memory.
        masked_layers: Masked layers of the large model.
        entries: Sizes of the tensors whose masks are compared.
        records: Records per step.
        length_tokens: Tokens per record.
        steps: Optimizer steps of each training run, including one warm-up step.
        quickstart_steps: Optimizer steps of the quickstart.
        quickstart_records: Records per quickstart step, and number of its validation records.
        prompts: Prompts answered at each batch size.
        new_tokens: Tokens per answer.
        budgets: Maximum tokens per batch.
        tests: Test files to run.
    """

    rehearses: bool
    small: Shape
    large: Shape
    masked_layers: str
    entries: tuple[int, ...]
    records: int
    length_tokens: int
    steps: int
    quickstart_steps: int
    quickstart_records: int
    prompts: int
    new_tokens: int
    budgets: tuple[int, int]
    tests: tuple[str, ...]


ON_A_GPU = Scale(
    rehearses=False,
    small=Shape(128_256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
    large=Shape(128_256, 4096, 14_336, 32, 32, 8),
    masked_layers="4-7",
    entries=(16_777_216, 58_720_256),
    records=4,
    length_tokens=1024,
    steps=4,
    quickstart_steps=20,
    quickstart_records=16,
    prompts=128,
    new_tokens=64,
    budgets=(4096, 131_072),
    tests=GPU_TESTS,
)
"""Shapes of Llama 3.2 3B and Llama 3.1 8B; entries are the sizes of their projections."""

REHEARSAL = Scale(
    rehearses=True,
    small=Shape(512, 32, 64, 3, 4, 2, tie_word_embeddings=True),
    large=Shape(512, 64, 128, 4, 4, 2),
    masked_layers="1-2",
    entries=(10_000, 30_001),
    records=2,
    length_tokens=24,
    steps=2,
    quickstart_steps=4,
    quickstart_records=2,
    prompts=6,
    new_tokens=4,
    budgets=(120, 4096),
    tests=("tests/training/updates/test_held_entries.py",),
)
