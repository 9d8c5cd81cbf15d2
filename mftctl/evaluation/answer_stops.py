"""Stops of an answer: end tokens, and plain text for templates that end a turn with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftctl.data.chat_rendering import ChatRenderer
from mftctl.files.regular import read_regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class AnswerStops:
    """The tokens and texts that end an answer.

    Attributes:
        token_ids: End tokens.
        texts: End texts, if a turn does not end with a single token.
    """

    token_ids: frozenset[int]
    texts: tuple[str, ...] = ()

    def before(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens before the first end token, which need not be a special token."""
        end = next((place for place, token in enumerate(token_ids) if token in self.token_ids), len(token_ids))
        return list(token_ids[:end])


def answer_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AnswerStops:
    """The stops of a model's answers: from its generation settings, its tokenizer and its chat template.

    Args:
        model: With generation settings.
        tokenizer: The model's tokenizer, with the chat template in use.
    """
    turn = turn_stops(tokenizer)
    named = [*_as_list(model.generation_config.eos_token_id), tokenizer.eos_token_id]
    return AnswerStops(turn.token_ids | {int(token) for token in named if token is not None}, turn.texts)


def turn_stops(tokenizer: PreTrainedTokenizerBase) -> AnswerStops:
    """The stops of an assistant turn in the chat template; none without a template."""
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template:
        return AnswerStops(frozenset())
    stop = ChatRenderer(tokenizer, datetime.now(UTC)).stop
    token = stop_token(tokenizer, stop)
    if token is not None:
        return AnswerStops(frozenset({token}))
    return AnswerStops(frozenset(), (stop,) if stop else ())


def stop_token(tokenizer: PreTrainedTokenizerBase, stop: str) -> int | None:
    """The special token at the end of a stop, or else its first one; None if the stop is plain text."""
    if not stop:
        return None
    ids: list[int] = tokenizer(stop, add_special_tokens=False, verbose=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    return next((token for token in (*ids[-1:], *ids) if token in special), None)


def name_stops(folder: Path, token_ids: Sequence[int]) -> None:
    """Adds end tokens to the generation settings of a checkpoint.

    Args:
        folder: The checkpoint.
        token_ids: The end tokens.
    """
    path = folder / _GENERATION_FILE
    settings: dict[str, Any] = json.loads(read_regular(path)) if path.is_file() else {}
    before = _as_list(settings.get("eos_token_id"))
    missing = [token for token in token_ids if token not in before]
    if missing:
        named = [*before, *missing]
        settings["eos_token_id"] = named if len(named) > 1 else named[0]
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_list(token: int | list[int] | None) -> list[int]:
    return [] if token is None else list(token) if isinstance(token, list) else [token]
