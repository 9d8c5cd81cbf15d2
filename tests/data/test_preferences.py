"""Preference records in every shape, as tokens, in tables; and one named test per way in which one is invalid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mftctl.data.encoding import Encoder, PromptTooLongError
from mftctl.data.examples import IGNORED_LABEL, Example, Message, RecordKind
from mftctl.data.formats import to_example, unused_fields
from mftctl.data.overlap import question_keys
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import answer_lengths, encode_prepared, token_lengths, token_totals, with_reference
from mftctl.data.record_issues import RecordIssues, Remark
from mftctl.data.sources import DataSource
from mftctl.data.splits import split_validation
from mftctl.errors import DataError
from mftctl.progress import Silence
from tests.conftest import build_tokenizer
from tests.data.prepared_examples import prepared
from tests.preference_records import SHAPES, preference_records, write_preferences

WHERE = "train.jsonl:17"
QUESTION, RIGHT, WRONG = Message("user", "2+2?"), Message("assistant", "4"), Message("assistant", "5")
PREFERENCE = Example("chat", (QUESTION, RIGHT), WHERE, has_turns=True, rejected=(QUESTION, WRONG))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, ANSWERED, ANSWERED_WRONGLY = turn("user", "2+2?"), turn("assistant", "4"), turn("assistant", "5")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED_WRONGLY]},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY]},
        # UltraFeedback: the prompt as text, repeated in whole conversations.
        {"prompt": "2+2?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY], "score_chosen": 9.0},
        {"prompt": [ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY]},
        {"prompt": "2+2?", "chosen": [ANSWERED], "rejected": [ANSWERED_WRONGLY]},
        {"messages": [ASKED, ANSWERED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY]},
    ],
    ids=["explicit", "implicit", "repeated text", "repeated turns", "text and turns", "with messages"],
)
def test_turns_in_every_shape(record: dict[str, Any]) -> None:
    assert to_example(record, WHERE) == PREFERENCE


def test_texts_with_a_prompt_are_a_question_and_two_answers() -> None:
    example = to_example({"prompt": "2+2?", "chosen": "4", "rejected": "5", "id": 3}, WHERE)
    assert example == Example("completion", (QUESTION, RIGHT), WHERE, rejected=(QUESTION, WRONG))
    assert unused_fields({"prompt": "2+2?", "chosen": "4", "rejected": "5", "id": 3}) == {"id"}


def test_texts_without_a_prompt_share_whole_words() -> None:
    example = to_example({"chosen": "The sky is green-blue.", "rejected": "The sky is green."}, WHERE)
    assert example.prompt == (Message("user", "The sky is"),)
    assert [side.answer for side in example.sides] == [" green-blue.", " green."]


def test_system_prompt_tools_and_template_variables_belong_to_both_sides() -> None:
    record = {
        "system": "Add.",
        "prompt": "2+2?",
        "chosen": "4",
        "rejected": "5",
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"x": True},
    }
    sides = to_example(record, WHERE).sides
    assert [side.messages[0] for side in sides] == [Message("system", "Add.")] * 2
    assert {json.loads(side.tools)[0]["name"] for side in sides} == {"add"}
    assert {json.loads(side.template_args)["x"] for side in sides} == {True}


def test_only_the_turns_behind_the_prompt_are_trained_on() -> None:
    earlier = [turn("user", "Hi"), turn("assistant", "Hello"), ASKED]
    record = {"chosen": [*earlier, ANSWERED], "rejected": [*earlier, ANSWERED_WRONGLY, turn("user", "?"), ANSWERED]}
    example = to_example(record, WHERE)
    learned = [[m.content for m in side.messages if m.role == "assistant" and m.is_learned] for side in example.sides]
    assert learned == [["4"], ["5", "4"]]
    assert [message.content for message in example.prompt] == ["Hi", "Hello", "2+2?"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "half of a preference"),
        ({"prompt": "a", "rejected": "b", "completion": "c"}, "half of a preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "half of a preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "a b", "rejected": "a b"}, "are the same"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "empty"),
        ({"prompt": "a", "chosen": "b", "rejected": [ANSWERED]}, "wrong type"),
        ({"prompt": "a", "chosen": [ANSWERED], "rejected": "b"}, "wrong type"),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "wrong type"),
        ({"chosen": "yes", "rejected": "no"}, "do not answer the same prompt"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [turn("user", "3+3?"), ANSWERED_WRONGLY]}, "the same prompt"),
        (
            {
                "chosen": [turn("system", "s"), ASKED, ANSWERED],
                "rejected": [turn("system", "s"), turn("user", "b"), RIGHT],
            },
            "wrong type",
        ),
        ({"prompt": "3+3?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY]}, "another prompt"),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": []}, "another prompt"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED_WRONGLY, ASKED]}, "does not end with an answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}, "cannot have images"),
    ],
)
def test_invalid_preferences(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        to_example(record, WHERE)
    assert caught.value.path == WHERE


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=3, max_size=3, unique=True))
def test_canonical_form_holds_both_answers(texts: list[str]) -> None:
    question, *answers = texts
    chosen, rejected = (Message("assistant", answer) for answer in answers)
    asked = Message("user", question)
    example = Example("chat", (asked, chosen), WHERE, rejected=(asked, rejected))
    content = example.canonical()
    assert Example.from_canonical(content, WHERE, has_turns=False) == example
    swapped = Example("chat", (asked, rejected), WHERE, rejected=(asked, chosen))
    assert swapped.canonical() != content != Example("chat", (asked, chosen), WHERE).canonical()


def test_prompts_are_compared_without_the_answers() -> None:
    plain = Example("chat", (QUESTION, RIGHT), WHERE)
    assert PREFERENCE.prompt_content() == plain.prompt_content()
    first, second = question_keys(prepared([PREFERENCE, plain]))
    assert first == second


@pytest.mark.parametrize("shape", SHAPES)
def test_both_sequences_are_those_of_single_answers(shape: str) -> None:
    encoder = Encoder(build_tokenizer() if "turns" in shape else build_tokenizer(chat_template=None))
    for number, record in enumerate(preference_records(4, shape)):
        example = to_example(record, f"{WHERE}:{number}")
        found = encoder.encode(example, 64)
        alone = [encoder.encode(side, 64) for side in example.sides]
        assert [(side.input_ids, side.labels) for side in found.sides] == [(one.input_ids, one.labels) for one in alone]
        assert found.tokens == sum(len(one.input_ids) for one in alone)
        assert found.longest_tokens == max(len(one.input_ids) for one in alone)
        assert found.answer_tokens == sum(one.answer_tokens for one in alone)


def test_an_implicit_prompt_in_texts_never_meets_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    example = to_example({"chosen": "2+2? yes", "rejected": "2+2? no"}, WHERE)
    found = Encoder(tokenizer).encode(example, 64)
    assert [tokenizer.decode(side.input_ids) for side in found.sides] == ["2+2? yes<|end|>", "2+2? no<|end|>"]


def test_a_cut_answer_is_remarked_and_a_prompt_that_is_too_long_leaves_the_record_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example, encoder = to_example({"prompt": "ab", "chosen": "cd", "rejected": "efghijk"}, WHERE), Encoder(tokenizer)
    whole = encoder.encode(example, 64)
    shorter = encoder.encode(example, len(whole.input_ids))
    assert (whole.remarks, shorter.remarks) == (Remark.NONE, Remark.CUT)
    assert shorter.rejected is not None
    assert len(shorter.rejected.input_ids) == len(whole.input_ids)
    with pytest.raises(PromptTooLongError):
        encoder.encode(example, 4)


def test_answers_that_differ_only_behind_the_maximum_length(tokenizer: PreTrainedTokenizerFast) -> None:
    example = to_example({"prompt": "ab", "chosen": "cdefg", "rejected": "cdefh"}, WHERE)
    with pytest.raises(DataError, match="the same tokens") as caught:
        Encoder(tokenizer).encode(example, 8)
    assert "raise --max-length" in str(caught.value.hint)


def test_prepared_preferences_are_those_encoded_one_by_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_preferences(tmp_path / "train.jsonl", 6, "turns")
    examples = load_examples([DataSource(str(path))], kind="preferences")
    encoder = Encoder(tokenizer)
    found = encode_prepared(examples, encoder, 64, RecordIssues(), Silence()).records
    expected = [encoder.encode(example, 64) for example in examples]
    assert list(found) == expected
    assert token_lengths(found) == [record.longest_tokens for record in expected] == token_lengths(expected)
    assert token_totals(found) == [record.tokens for record in expected] == token_totals(expected)
    assert answer_lengths(found) == [record.answer_tokens for record in expected]
    reference = np.arange(12, dtype=np.float64).reshape(6, 2)
    for records in (found, expected):
        known = with_reference(records, reference)
        assert [record.reference for record in known[1::2]] == [(2.0, 3.0), (6.0, 7.0), (10.0, 11.0)]
        assert known[0].ignored().sides[1].labels == [IGNORED_LABEL] * len(expected[0].sides[1].labels)


@pytest.mark.parametrize(
    ("kind", "record", "hint"),
    [
        ("answers", {"prompt": "a", "chosen": "b", "rejected": "c"}, "--objective dpo"),
        ("preferences", {"prompt": "a", "completion": "b"}, "--objective sft"),
    ],
)
def test_a_file_of_the_other_kind_is_one_error(
    tmp_path: Path, kind: RecordKind, record: dict[str, str], hint: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(record)}\n" * 3)
    issues = RecordIssues()
    with pytest.raises(DataError) as caught:
        load_examples([DataSource(str(path))], issues=issues, kind=kind)
    assert caught.value.path == str(path)
    assert hint in str(caught.value.hint)
    assert len(load_examples([DataSource(str(path))], kind=None)) == 3


def test_single_records_of_the_other_kind_can_be_skipped(tmp_path: Path) -> None:
    path = write_preferences(tmp_path / "train.jsonl", 3)
    with path.open("a") as stream:
        stream.write('{"prompt": "a", "completion": "b"}\n')
    issues = RecordIssues()
    assert len(load_examples([DataSource(str(path))], issues=issues, kind="preferences")) == 3
    [error] = issues.refused
    assert error.path == f"{path}:4"
    with pytest.raises(DataError, match="DPO needs preferences"):
        issues.settle("error")
    issues.settle("skip")
    with pytest.raises(DataError):
        load_examples([DataSource(str(path))], kind="preferences")


def test_preferences_with_the_same_prompt_are_not_split() -> None:
    other = Example("chat", (QUESTION, RIGHT), WHERE, rejected=(QUESTION, Message("assistant", "6")))
    more = [to_example(record, WHERE) for record in preference_records(10, "turns")]
    train, validation = split_validation(prepared([PREFERENCE, other, *more]), 0.2, 0)
    kept = {example.prompt for example in train}
    assert not kept & {example.prompt for example in validation}
