"""Text out of token ids that stand behind others."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
"""Enough for the characters that tokens make together; more would be decoded for nothing."""


def decode_behind(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool = False,
) -> str:
    """The text that the ids add to those before them.

    By themselves, tokenizers of the Llama 2 family decode them without their first space.

    Args:
        tokenizer: Of the model.
        before: The ids of the prompt.
        token_ids: The ids of the answer.
        skip_special_tokens: Whether special tokens are left out.
    """

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    context = list(before[-_CONTEXT_TOKENS:])
    start, whole = decode(context), decode([*context, *token_ids])
    return whole[len(start) :] if whole.startswith(start) else decode(token_ids)
