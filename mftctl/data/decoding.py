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
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    if skip_special_tokens:  # of the answer alone: one at the end of the prompt keeps the space behind it
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(tokenizer.all_special_ids)
        token_ids = [token for token in token_ids if token not in special]
    context = list(before[-_CONTEXT_TOKENS:])
    start, whole = decode(context), decode([*context, *token_ids])
    return whole[len(start) :] if whole.startswith(start) else decode(token_ids)
