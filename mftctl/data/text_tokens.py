"""The tokens of texts, and of texts that continue others."""

from __future__ import annotations

from collections.abc import Set
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_SHORT_CHARACTERS = 32
_MOST_KNOWN_TEXTS = 1024


class Text(NamedTuple):
    """A text to tokenise, and whether it continues another text."""

    text: str
    continues: bool


class TextTokens:
    """Tokenises texts without special tokens of its own, and remembers the short ones.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[Text, list[int]] = {}

    def tokenized(self, texts: Set[Text]) -> dict[Text, list[int]]:
        """The ids of each text.

        Tokenizers of the Llama 2 family prepend a space to what they take for the start of a text. A newline prepended
        to a text that continues another takes that space and is dropped again, unless it merges with the text, which
        theirs never does.

        Args:
            texts: The texts.
        """
        found = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in texts if text not in found]
        line_end = self.line_end if any(text.continues for text in new) else []
        for text, ids in zip(
            new, self._ids([f"\n{text}" if continues else text for text, continues in new]), strict=True
        ):
            if not text.continues:
                found[text] = ids
            elif ids[: len(line_end)] == line_end:
                found[text] = ids[len(line_end) :]
            else:
                [found[text]] = self._ids([text.text])
            # Text that a template writes between turns is the same in every record.
            if len(text.text) <= _SHORT_CHARACTERS and len(self._known) < _MOST_KNOWN_TEXTS:
                self._known[text] = found[text]
        return found

    @cached_property
    def line_end(self) -> list[int]:
        """The tokens of a newline."""
        [ids] = self._ids(["\n"])
        return ids

    @cached_property
    def default_bos(self) -> list[int]:
        """The begin-of-sequence token if the tokenizer adds it by default, otherwise nothing."""
        ids: list[int] = self._tokenizer("\n", verbose=False)["input_ids"]
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the warning about the model's own maximum length does not concern --max-length.
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids
