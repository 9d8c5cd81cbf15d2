"""Seeded sampling that depends only on the prompt and the seed, not on the batch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor

_SEED_BYTES = 6
"""Small enough for every random number generator."""


def sample_seeds(seed: int, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
    """The seed of each request; equal requests are numbered, because each is a separate sample.

    Args:
        seed: Seed of the evaluation.
        requests: Prompt and settings of each request.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for request in requests:
        text = json.dumps([seed, *request], sort_keys=True)
        digest = hashlib.sha256(f"{text}{seen[text]}".encode()).digest()
        seeds.append(int.from_bytes(digest[:_SEED_BYTES], "little"))
        seen[text] += 1
    return seeds


class SeededSampling(LogitsProcessor):
    """Samples the next token of each row with the row's own random numbers and masks out all other tokens.

    Greedy decoding then yields a sample. The random number for each position is fixed from the start, so the result of
    a row depends neither on the other rows of the batch nor on their number.

    Args:
        seeds: One per row.
        temperature: Divides the logits.
        width_tokens: Length of the padded prompts.
        new_tokens: Maximum tokens per answer.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, width_tokens: int, new_tokens: int) -> None:
        self._temperature = temperature
        self._width = width_tokens
        self._drawn = torch.stack(
            [torch.rand(new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that keep one token per row, `(rows, vocabulary)`."""
        place = min(input_ids.shape[1] - self._width, self._drawn.shape[1] - 1)
        summed = (scores.float() / self._temperature).softmax(-1).cumsum(-1)
        drawn = self._drawn[:, place, None].to(summed.device) * summed[:, -1:]
        token = torch.searchsorted(summed, drawn, right=True).clamp(max=summed.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
