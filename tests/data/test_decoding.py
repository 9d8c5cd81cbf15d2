"""Text after a prompt is decoded in the context of the prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mftctl.data.decoding import decode_behind
from tests.data.test_encoding import BYTES_PLAIN, LLAMA_PLAIN, LLAMA_PLAIN_ALWAYS, encode, encode_prompt, example


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [BYTES_PLAIN, LLAMA_PLAIN, LLAMA_PLAIN_ALWAYS])
@given(answer=st.text(st.sampled_from("the cats \n"), min_size=1, max_size=12).filter(str.strip))
def test_leading_spaces_are_kept(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    record = example("the cat", f"    {answer}", kind="completion")
    prompt = encode_prompt(record, tokenizer)
    written = encode(record, tokenizer, 1000).input_ids[len(prompt) :]
    assert decode_behind(tokenizer, prompt, written, skip_special_tokens=True) == f"    {answer}"


def test_special_tokens_stay_where_they_are_wanted() -> None:
    eos = BYTES_PLAIN.eos_token_id
    assert decode_behind(BYTES_PLAIN, [], [eos]) == "</s>"
    assert decode_behind(BYTES_PLAIN, [], [eos], skip_special_tokens=True) == ""


def test_character_that_is_cut_by_the_prompt() -> None:
    ids = BYTES_PLAIN("é")["input_ids"]
    assert len(ids) == 2
    assert decode_behind(BYTES_PLAIN, ids[:1], ids[1:]) in ("�", "")
