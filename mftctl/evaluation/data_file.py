"""Loss and exact match of a model on the records of a data file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mftctl.data.batching import pad_token_id
from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_room import OnShortage, answer_room
from mftctl.evaluation.exact_match import exact_match
from mftctl.evaluation.generation import context_tokens, default_max_new_tokens, generate_answers
from mftctl.evaluation.inference import OnProgress
from mftctl.evaluation.losses import SampleLoss, mean_loss, sample_losses
from mftctl.evaluation.statistics import standard_error_of_loss, standard_error_of_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mftctl.data.encoding import Encoded, EncodedRecords, Encoder
    from mftctl.data.examples import Example


@dataclass(frozen=True, slots=True)
class SampleRow:
    """The result of a model on one record.

    Attributes:
        where: Origin of the record, such as `test.jsonl:17`.
        prompt: Text of the turn before the answer; None if there is none.
        nll: Sum of the negative log-likelihoods of the answer's tokens, in nats.
        answer_tokens: Number of tokens in that sum.
        reference: The record's answer.
        prediction: The generated answer; None if none was requested or the record has no prompt.
        correct: Whether the prediction matches; None without a prediction.
    """

    where: str
    prompt: str | None
    nll: float
    answer_tokens: int
    reference: str
    prediction: str | None
    correct: bool | None


@dataclass(frozen=True, slots=True)
class DataFileResult:
    """Loss and exact match over all records.

    Attributes:
        loss: Negative log-likelihood per answer token, in nats.
        loss_standard_error: By the delta method over records; None with a single record.
        answer_tokens: Number of tokens that the loss covers.
        exact_match: Share of correct predictions; None if nothing was generated.
        exact_match_standard_error: Binomial; None with fewer than two predictions.
        predictions: Number of generated answers.
        max_new_tokens: Maximum tokens per answer; None if nothing was generated.
        rows: The records in file order.
    """

    loss: float
    loss_standard_error: float | None
    answer_tokens: int
    exact_match: float | None
    exact_match_standard_error: float | None
    predictions: int
    max_new_tokens: int | None
    rows: tuple[SampleRow, ...]


class RecordMeasure(Protocol):
    """Measures losses and answers: a model in memory, or one on a server."""

    @property
    def model_context_tokens(self) -> int | None:
        """The model's context length in tokens; None if its configuration sets no limit."""

    def losses(self, encoded: Sequence[Encoded], on_progress: OnProgress | None) -> list[SampleLoss]:
        """The loss of each record."""

    def answers(self, questions: Sequence[Example], max_new_tokens: int, on_progress: OnProgress | None) -> list[str]:
        """The greedy answer to each question."""


def evaluate_examples(
    model: PreTrainedModel,
    encoder: Encoder,
    records: EncodedRecords,
    *,
    batch_tokens: int = 4096,
    generate: bool = True,
    on_progress: OnProgress | None = None,
    on_shortage: OnShortage | None = None,
) -> DataFileResult:
    """The model's loss on every record and exact match on those with a prompt; all processes share the work.

    Args:
        model: A causal language model.
        encoder: Encoder for its tokenizer.
        records: Records encoded with it, truncated as in training for the loss; prompts are never truncated.
        batch_tokens: Maximum tokens per batch for the loss, including padding.
        generate: Whether to generate answers, which takes most of the time.
        on_progress: Called with the steps done and the total; each loss and each generated answer is a step.
        on_shortage: Called if batches must shrink for lack of memory.

    Raises:
        EvaluationError: There are no records, or a prompt does not fit the model's context.
    """
    measure = _InMemory(model, encoder, batch_tokens, on_shortage)
    return measure_records(measure, encoder, records, generate=generate, on_progress=on_progress)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A model in memory, with all processes sharing the work."""

    model: PreTrainedModel
    encoder: Encoder
    batch_tokens: int
    on_shortage: OnShortage | None

    @property
    def model_context_tokens(self) -> int | None:
        return context_tokens(self.model)

    def losses(self, encoded: Sequence[Encoded], on_progress: OnProgress | None) -> list[SampleLoss]:
        return sample_losses(
            self.model,
            encoded,
            pad_token_id=pad_token_id(self.encoder.tokenizer),
            batch_tokens=self.batch_tokens,
            on_progress=on_progress,
            together=True,
        )

    def answers(self, questions: Sequence[Example], max_new_tokens: int, on_progress: OnProgress | None) -> list[str]:
        return generate_answers(
            self.model,
            self.encoder,
            questions,
            max_new_tokens=max_new_tokens,
            room=answer_room(self.model, self.on_shortage),
            on_progress=on_progress,
        )


def measure_records(
    measure: RecordMeasure,
    encoder: Encoder,
    records: EncodedRecords,
    *,
    generate: bool,
    on_progress: OnProgress | None = None,
) -> DataFileResult:
    """The loss on every record and exact match on those with a prompt.

    Args:
        measure: Measures the records.
        encoder: Encoder for the model's tokenizer.
        records: The records, as for `evaluate_examples`.
        generate: Whether to generate answers.
        on_progress: Called with the steps done and the total.

    Raises:
        EvaluationError: There are no records, or a prompt does not fit the context.
    """
    examples, encoded = records.examples, records.records
    if not examples:
        raise EvaluationError("There are no records to evaluate.", expected="at least one record", actual=0)
    asked = [index for index, example in enumerate(examples) if generate and example.prompt]
    steps = len(encoded) + len(asked)
    losses = measure.losses(encoded, _shifted(on_progress, 0, steps))
    predictions: dict[int, str] = {}
    max_new_tokens = None
    if asked:
        questions = [examples[index] for index in asked]
        max_new_tokens = default_max_new_tokens(
            [encoded[index] for index in asked],
            longest_prompt_tokens=max(len(encoder.prompt(question)) for question in questions),
            limit_tokens=measure.model_context_tokens,
        )
        answers = measure.answers(questions, max_new_tokens, _shifted(on_progress, len(encoded), steps))
        predictions = dict(zip(asked, answers, strict=True))
    rows = [
        _row(example, loss, predictions.get(index))
        for index, (example, loss) in enumerate(zip(examples, losses, strict=True))
    ]
    return _result(losses, rows, max_new_tokens)


def _row(example: Example, loss: SampleLoss, prediction: str | None) -> SampleRow:
    return SampleRow(
        where=example.where,
        prompt=example.prompt[-1].content if example.prompt else None,
        nll=loss.nll,
        answer_tokens=loss.answer_tokens,
        reference=example.answer,
        prediction=prediction,
        correct=None if prediction is None else exact_match(prediction, example.answer),
    )


def _result(losses: Sequence[SampleLoss], rows: Sequence[SampleRow], max_new_tokens: int | None) -> DataFileResult:
    correct = [row.correct for row in rows if row.correct is not None]
    return DataFileResult(
        loss=mean_loss(losses),
        loss_standard_error=standard_error_of_loss(losses) if len(losses) > 1 else None,
        answer_tokens=sum(loss.answer_tokens for loss in losses),
        exact_match=sum(correct) / len(correct) if correct else None,
        exact_match_standard_error=standard_error_of_share(correct) if len(correct) > 1 else None,
        predictions=len(correct),
        max_new_tokens=max_new_tokens,
        rows=tuple(rows),
    )


def _shifted(on_progress: OnProgress | None, done_before: int, steps: int) -> OnProgress | None:
    """Reports the progress of a part as progress of the whole."""
    if on_progress is None:
        return None
    return lambda done, _: on_progress(done_before + done, steps)
