"""Answers and likelihoods of a model on a server, for exactly the prompts that the local engine uses."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_stops import answer_stops
from mftctl.evaluation.generation import context_tokens
from mftctl.evaluation.lm.base import Asked, KeptAnswers
from mftctl.evaluation.lm.stop_strings import cut_at
from mftctl.evaluation.server.completion_server import CompletionServer
from mftctl.evaluation.server.messages import Question
from mftctl.evaluation.server.served_records import ServedRecords
from mftctl.masking.checkpoints.load_weights import read_configuration
from mftctl.masking.checkpoints.meta_models import build_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.data.encoding import Encoder


_BATCH = 1024
"""Texts for which lm-eval asks for likelihoods at a time; the server is sent a few of them at a time."""


class ServedAnswers(KeptAnswers, HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's local model class with a server in place of the weights.

    It has the model without its weights, so prompts, their tokens and the context length are those of the local engine.

    Args:
        server: The server.
        checkpoint: Folder of the model that it serves.
        tokenizer: The model's tokenizer.
        seed: Seed for sampling.
        has_turns: Whether prompts have a chat template; plain text that ends a turn then ends an answer.
        add_bos_token: Whether prompts start with a begin-of-sequence token; None for the tokenizer's default.

    Raises:
        ModelError: transformers does not know the model.
    """

    _context_hint = "choose a task with fewer few-shot examples, or start the server with a longer context"

    def __init__(
        self,
        server: CompletionServer,
        checkpoint: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        has_turns: bool = False,
        add_bos_token: bool | None = None,
    ) -> None:
        model = _without_weights(checkpoint)
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=_BATCH, add_bos_token=add_bos_token
        )
        self.server = server
        self._seed = seed
        self._stops = answer_stops(model, tokenizer)
        self._stop_texts = self._stops.texts if has_turns else ()

    @property
    def max_length(self) -> int:
        """Maximum tokens of prompt and answer, for both the model and the server."""
        return min(int(super().max_length), self.server.model.context_tokens or sys.maxsize)

    def for_records(self, encoder: Encoder) -> ServedRecords:
        """What measures the records of a data file on the server.

        Args:
            encoder: Encoder for the model's tokenizer.
        """
        return ServedRecords(
            self.server, encoder, answer_stops(self.model, encoder.tokenizer), context_tokens(self.model)
        )

    def _answer(self, asked: Asked) -> Iterator[tuple[list[int], list[str]]]:
        until = [*asked.setting["until"], *self._stop_texts]
        questions = [
            Question(
                token_ids=token_ids,
                text=text if self.server.form.takes_tokens else self._as_text(token_ids, text),
                stops=until,
                end_tokens=sorted(self._stops.token_ids),
                max_new_tokens=asked.setting["max_new_tokens"],
                temperature=asked.setting["temperature"],
                seed=seed,
            )
            for token_ids, text, seed in zip(asked.prompts, asked.texts, asked.seeds, strict=True)
        ]
        for place, written in self.server.answers(questions):
            self.generated_tokens += written.tokens
            yield [place], [cut_at(written.text, until)]

    def _as_text(self, token_ids: Sequence[int], text: str) -> str:
        """The text that the model's tokenizer turns into these ids, for a server that tokenises it with that tokenizer.

        Raises:
            EvaluationError: There is none.
        """
        plain = text.removeprefix(self.tokenizer.bos_token or "")
        for candidate in (text, plain):
            if self.tokenizer.encode(candidate) == token_ids:
                return candidate
        raise EvaluationError(
            "The server takes prompts as text only, and adds a token to this one that the local engine does not.",
            path=self.server.url,
            expected="a server that takes token ids, such as vLLM or llama.cpp",
            actual=repr(text[:40]),
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        texts = [[*context, *continuation] for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        for place, scored in self.server.likelihoods(texts):
            start = len(requests[place][1]) - 1  # the first token has no likelihood
            found[place] = math.fsum(scored.logprobs[start:]), all(scored.is_likeliest[start:])
            if self._on_progress is not None:
                self._on_progress(len(found), len(texts))
        return [found[place] for place in range(len(texts))]


def _without_weights(checkpoint: Path) -> PreTrainedModel:
    """The model of a checkpoint on the meta device, with its generation settings, which name its end tokens."""
    model = build_skeleton(read_configuration(checkpoint), torch.float32)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    return model
