"""The shown parts of a record are those that are trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from mftctl.data.encoding import Encoded, Encoder
from mftctl.data.examples import Example, Message
from mftctl.workflows.planning.training_data import trained_segments


def _shown(record: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    return [(segment.text, segment.is_answer) for segment in trained_segments(record, tokenizer)]


def test_prompt_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("chat", (Message("user", "1+1?"), Message("assistant", "2")), "here")
    assert _shown(Encoder(tokenizer).encode(example, 100), tokenizer) == [
        ("<|user|>1+1?<|end|><|assistant|>", False),
        ("2<|end|>", True),
    ]


def test_a_truncated_answer_is_shown_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("chat", (Message("user", "1+1?"), Message("assistant", "two")), "here")
    assert _shown(Encoder(tokenizer).encode(example, 9), tokenizer)[-1] == ("tw", True)


def test_the_first_token_of_a_text_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("text", (Message("assistant", "abc"),), "here")
    assert _shown(Encoder(tokenizer).encode(example, 100), tokenizer) == [("a", False), ("bc<|end|>", True)]
