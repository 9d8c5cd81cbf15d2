"""Decoding of token ids that follow other token ids."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
"""Enough for characters that span several tokens; decoding more would be wasted work."""


def decode_behind(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool = False,
) -> str:
    """The text that the ids add to the ids before them.

    Decoded alone, they lose their leading space with tokenizers of the Llama 2 family.

    Args:
        tokenizer: The model's tokenizer.
        before: The ids of the prompt.
        token_ids: The ids of the answer.
        skip_special_tokens: Whether to omit special tokens.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    if skip_special_tokens:  # in the answer only: one at the end of the prompt preserves the space after it
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(tokenizer.all_special_ids)
        token_ids = [token for token in token_ids if token not in special]
    context = list(before[-_CONTEXT_TOKENS:])
    start, whole = decode(context), decode([*context, *token_ids])
    return whole[len(start) :] if whole.startswith(start) else decode(token_ids)
