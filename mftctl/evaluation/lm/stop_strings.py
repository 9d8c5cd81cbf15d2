"""Stop strings: generation stops at one, and the text is cut before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class StopStrings(StoppingCriteria):
    """Stops each row at its first stop string; checks only the rows and tokens where one can be new."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], width_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._width = width_tokens
        self._done: Tensor | None = None
        # A token is at least one byte or merges with the one before, so this many tokens contain any stop string and
        # whatever a token may have before it.
        self._look_back = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """True for each row that is done, `(rows,)` bool."""
        if self._done is None:
            self._done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        rows = (~self._done).nonzero().flatten().tolist()
        if self._strings and rows:
            recent = input_ids[:, max(self._width, input_ids.shape[1] - self._look_back) :].tolist()
            texts = self._tokenizer.batch_decode([recent[row] for row in rows])
            for row, text in zip(rows, texts, strict=True):
                self._done[row] = any(string in text for string in self._strings)
        return self._done


def cut_at(text: str, strings: Sequence[str]) -> str:
    """The text up to the first stop string.

    Args:
        text: The generated text.
        strings: Stop strings; empty ones are ignored.
    """
    return text[: min((text.find(string) for string in strings if string and string in text), default=len(text))]
