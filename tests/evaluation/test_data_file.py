from __future__ import annotations

import math

import pytest

from mftctl.data.batching import pad_token_id
from mftctl.data.encoding import EncodedRecords, Encoder
from mftctl.data.examples import Example, Message, TokenIds
from mftctl.errors import EvaluationError
from mftctl.evaluation import data_file
from mftctl.evaluation.data_file import evaluate_examples
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.evaluation.statistics import standard_error_of_loss
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import encode_records


def question(number: int, answer: str) -> Example:
    return Example("chat", (Message("user", f"{number}?"), Message("assistant", answer)), f"d.jsonl:{number}")


def text(number: int, words: str) -> Example:
    return Example("text", (Message("assistant", words),), f"d.jsonl:{number}")


@pytest.fixture
def always_eighteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "generate_answers", lambda *args, **_: ["so\n#### 18"] * len(args[2]))


@pytest.mark.usefixtures("always_eighteen")
def test_exact_match_is_over_the_records_with_a_prompt() -> None:
    examples = [question(1, "#### 18.0"), text(2, "some words"), question(3, "#### 19"), question(4, "#### 18")]
    result = evaluate_examples(
        build_llama(layers=1), Encoder(build_tokenizer()), encode_records(examples, build_tokenizer(), 64)
    )
    assert result.exact_match == pytest.approx(2 / 3)
    assert result.exact_match_standard_error == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert result.predictions == 3
    assert [row.correct for row in result.rows] == [True, None, False, True]
    assert [row.prediction for row in result.rows] == ["so\n#### 18", None, "so\n#### 18", "so\n#### 18"]
    assert [row.reference for row in result.rows] == [example.answer for example in examples]
    assert [row.where for row in result.rows] == [f"d.jsonl:{number}" for number in (1, 2, 3, 4)]


def test_the_loss_is_the_one_of_sample_losses() -> None:
    model, tokenizer = build_llama(), build_tokenizer()
    examples = [question(1, "#### 18"), text(2, "some words"), question(3, "a longer answer")]
    result = evaluate_examples(model, Encoder(tokenizer), encode_records(examples, tokenizer, 64), generate=False)
    losses = sample_losses(model, encode_records(examples, tokenizer, 64).records, pad_token_id=pad_token_id(tokenizer))
    assert result.loss == mean_loss(losses)
    assert result.loss_standard_error == standard_error_of_loss(losses)
    assert [(row.nll, row.answer_tokens) for row in result.rows] == [(x.nll, x.answer_tokens) for x in losses]
    assert result.answer_tokens == sum(loss.answer_tokens for loss in losses)
    assert (result.exact_match, result.exact_match_standard_error, result.max_new_tokens) == (None, None, None)


def test_a_model_is_asked_end_to_end() -> None:
    calls: list[tuple[int, int]] = []
    examples = [question(number, "#### 18") for number in range(1, 6)]
    result = evaluate_examples(
        build_llama(),
        Encoder(build_tokenizer()),
        encode_records(examples, build_tokenizer(), 64),
        batch_tokens=100,
        on_progress=lambda *call: calls.append(call),
    )
    assert result.exact_match == 0
    assert result.max_new_tokens is not None
    assert 7 * 3 // 2 + 16 <= result.max_new_tokens <= 8 * 3 // 2 + 16
    assert all(row.prediction is not None for row in result.rows)
    assert calls[-1] == (10, 10)
    assert (5, 10) in calls


def test_one_record_has_no_standard_errors() -> None:
    model = build_llama(layers=1)
    result = evaluate_examples(
        model, Encoder(build_tokenizer()), encode_records([question(1, "#### 18")], build_tokenizer(), 64)
    )
    assert result.loss_standard_error is None
    assert result.exact_match_standard_error is None
    assert result.exact_match == 0


def test_no_records_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no records"):
        evaluate_examples(build_llama(layers=1), Encoder(build_tokenizer()), EncodedRecords([], []))


def test_a_record_of_token_ids_has_a_loss_and_no_answer() -> None:
    ids = Example("tokens", (), "d:1", token_ids=TokenIds((7, 8, 9, 10), (-100, -100, 9, 10)))
    records = encode_records([ids, question(1, "#### 18")], build_tokenizer(), 64)
    result = evaluate_examples(build_llama(layers=1), Encoder(build_tokenizer()), records)
    assert (result.rows[0].answer_tokens, result.rows[0].prediction, result.predictions) == (2, None, 1)


def test_a_prompt_without_room_for_an_answer_is_named() -> None:
    examples = [question(1, "#### 18"), Example("chat", (Message("user", "x" * 40), Message("assistant", "y")), "d:2")]
    model = build_llama(layers=1, max_position_embeddings=42)
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        evaluate_examples(model, Encoder(build_tokenizer()), encode_records(examples, build_tokenizer(), 60))
    assert caught.value.path == "d:2"
