"""Samples that depend on their prompt and the seed, and not on what is answered beside them."""

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
"""As every generator of random numbers takes."""


def sample_seeds(seed: int, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
    """The seed of each request: equal requests are numbered, as each is a sample of its own.

    Args:
        seed: Of the evaluation.
        requests: Prompt and settings of each.
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
    """Draws the next token of each row by one random number of the row's own, and leaves that token alone.

    Greedy decoding then writes a sample. The number for each place is known from the start, so that neither the other
    rows of a batch nor their number changes what a row gets.

    Args:
        seeds: One a row.
        temperature: Logits are divided by it.
        width_tokens: Length of the padded prompts.
        new_tokens: The most tokens of an answer.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, width_tokens: int, new_tokens: int) -> None:
        self._temperature = temperature
        self._width = width_tokens
        self._drawn = torch.stack(
            [torch.rand(new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave one token of each row, `(rows, vocabulary)`."""
        place = min(input_ids.shape[1] - self._width, self._drawn.shape[1] - 1)
        summed = (scores.float() / self._temperature).softmax(-1).cumsum(-1)
        drawn = self._drawn[:, place, None].to(summed.device) * summed[:, -1:]
        token = torch.searchsorted(summed, drawn, right=True).clamp(max=summed.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
