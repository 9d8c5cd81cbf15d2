"""Losses and answers of a model on a server, on the records of a data file."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mftctl.data.examples import IGNORED_LABEL
from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_stops import AnswerStops
from mftctl.evaluation.generation import check_context
from mftctl.evaluation.inference import OnProgress
from mftctl.evaluation.lm.stop_strings import cut_at
from mftctl.evaluation.losses import SampleLoss
from mftctl.evaluation.server.completion_server import CompletionServer
from mftctl.evaluation.server.messages import Question

if TYPE_CHECKING:
    from mftctl.data.encoding import Encoded, Encoder
    from mftctl.data.examples import Example


@dataclass(frozen=True, slots=True)
class ServedRecords:
    """Measures records with a server; see `RecordMeasure`.

    Attributes:
        server: The server, which returns likelihoods.
        encoder: Encoder for the model's tokenizer.
        stops: The stops of the model's answers.
        model_context_tokens: The model's context length in tokens; None if its configuration sets no limit.
    """

    server: CompletionServer
    encoder: Encoder
    stops: AnswerStops
    model_context_tokens: int | None

    def losses(self, encoded: Sequence[Encoded], on_progress: OnProgress | None) -> list[SampleLoss]:
        """The loss of each record, in the given order.

        Args:
            encoded: Token ids and labels.
            on_progress: Called after each record.

        Raises:
            EvaluationError: A record does not fit the server's context.
            ServerError: The server cannot be reached, or refuses a request.
        """
        self._check_lengths(encoded)
        scored = [index for index, record in enumerate(encoded) if any(map(_counts, record.labels[1:]))]
        found = {index: SampleLoss(nll=0.0, answer_tokens=0) for index in set(range(len(encoded))) - set(scored)}
        for place, likelihoods in self.server.likelihoods([encoded[index].input_ids for index in scored]):
            labels = encoded[scored[place]].labels[1:]
            nlls = [-value for value, label in zip(likelihoods.logprobs, labels, strict=True) if _counts(label)]
            found[scored[place]] = SampleLoss(nll=math.fsum(nlls), answer_tokens=len(nlls))
            if on_progress is not None:
                on_progress(len(found), len(encoded))
        return [found[index] for index in range(len(encoded))]

    def answers(self, questions: Sequence[Example], max_new_tokens: int, on_progress: OnProgress | None) -> list[str]:
        """The greedy answer to each question, in the given order.

        Args:
            questions: Each with a prompt.
            max_new_tokens: Maximum tokens per answer.
            on_progress: Called after each answer.

        Raises:
            EvaluationError: A prompt and its answer do not fit the context, or the server cut an answer.
            ServerError: The server cannot be reached, or refuses a request.
        """
        prompts = [self.encoder.prompt(question) for question in questions]
        limits = (self.model_context_tokens, self.server.model.context_tokens)
        check_context(min((limit or sys.maxsize) for limit in limits), questions, prompts, max_new_tokens)
        asked = [
            Question(
                token_ids=prompt,
                text="",  # a server that returns likelihoods takes token ids
                stops=self.stops.texts,
                end_tokens=sorted(self.stops.token_ids),
                max_new_tokens=max_new_tokens,
            )
            for prompt in prompts
        ]
        texts: dict[int, str] = {}
        for index, written in self.server.answers(asked):
            texts[index] = cut_at(written.text, self.stops.texts)
            if on_progress is not None:
                on_progress(len(texts), len(questions))
        return [texts[index] for index in range(len(questions))]

    def _check_lengths(self, encoded: Sequence[Encoded]) -> None:
        limit = self.server.model.context_tokens
        for record in encoded:
            if limit is not None and len(record.input_ids) >= limit:  # a server returns likelihoods with one new token
                raise EvaluationError(
                    "A record does not fit the server's context.",
                    path=record.where,
                    expected=f"fewer than {limit} tokens",
                    actual=f"{len(record.input_ids)} tokens",
                    hint="start the server with a longer context, or lower eval.max_length_tokens",
                )


def _counts(label: int) -> bool:
    return label != IGNORED_LABEL
