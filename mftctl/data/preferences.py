"""Preference records: a prompt with a chosen and a rejected answer, in the shapes that TRL documents.

The prompt is explicit (`prompt`), or implicit: what both answers, given as whole texts or conversations, begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mftctl.data.conversations import answer_text, chat_example, messages_of, prompt_completion, unlearned, with_system
from mftctl.data.examples import Example, Message, shared_start
from mftctl.data.turn_ends import common_start
from mftctl.data.turns import Fields, text, wrong_type
from mftctl.errors import DataError

CHOSEN, REJECTED = "chosen", "rejected"
_ANSWERS = (CHOSEN, REJECTED)
_PROMPT = "prompt"


def preference(fields: Fields, where: str) -> Example:
    """A preference record as an example; of its turns, only those of the two answers are trained on.

    Args:
        fields: With `chosen` and `rejected`, both texts or both lists of turns.
        where: Origin of the record, for errors.

    Raises:
        DataError: A field has the wrong type, an answer is missing, the answers are the same, answer different
            questions, or repeat another prompt than the one given.
    """
    are_texts = [isinstance(fields[key], str) for key in _ANSWERS]
    if are_texts[0] != are_texts[1]:
        expected = "text" if are_texts[0] else "a list of turns"
        raise wrong_type(where, REJECTED, f"{expected}, as the chosen answer", fields[REJECTED])
    chosen, rejected = _of_texts(fields, where) if are_texts[0] else _of_turns(fields, where)
    if chosen.messages == rejected.messages:
        raise DataError(
            "The chosen and the rejected answer are the same.",
            path=where,
            key=REJECTED,
            expected="two different answers",
            hint="remove the record",
        )
    return replace(chosen, rejected=rejected.messages)


def _of_texts(fields: Fields, where: str) -> list[Example]:
    """Both answers, given as texts; without a prompt, texts that are never put into a chat template."""
    if _PROMPT in fields:
        return [prompt_completion(fields, where, key) for key in _ANSWERS]
    texts = [answer_text(fields, key, where) for key in _ANSWERS]
    before = _shared_words(texts) if texts[0] != texts[1] else ""
    if not before and texts[0] != texts[1]:
        raise _different_questions(where, "texts that begin alike, or a field prompt")
    prompt = Message("user", before)
    found = []
    for key, whole in zip(_ANSWERS, texts, strict=True):
        answer = answer_text({key: whole[len(before) :]}, key, where)
        found.append(Example("text", (prompt, Message("assistant", answer)), where))
    return found


def _shared_words(texts: Sequence[str]) -> str:
    """The whole words that both texts begin with, without the space behind them."""
    shared = common_start(*texts)
    end = max((index for index, character in enumerate(shared) if character.isspace()), default=0)
    return shared[:end].rstrip()


def _of_turns(fields: Fields, where: str) -> list[Example]:
    """Both answers, given as turns after the prompt or as whole conversations."""
    answers = [messages_of(fields[key], where, key) for key in _ANSWERS]
    before = _explicit_prompt(fields, answers, where)
    if before is None:
        shared = shared_start(*(turns[:-1] for turns in answers))
        if not shared or any(turns[len(shared)].role != "assistant" for turns in answers):
            raise _different_questions(where, "conversations that are the same up to the answers")
        before, answers = shared, [turns[len(shared) :] for turns in answers]
    asked = tuple(map(unlearned, before))
    return [
        chat_example(with_system((*asked, *turns), fields, where), fields, where, key)
        for key, turns in zip(_ANSWERS, answers, strict=True)
    ]


def _explicit_prompt(fields: Fields, answers: Sequence[tuple[Message, ...]], where: str) -> tuple[Message, ...] | None:
    """The turns of the prompt; None if the answers are whole conversations, which repeat it.

    Raises:
        DataError: They repeat another prompt.
    """
    if _PROMPT not in fields:
        return None
    if isinstance(fields[_PROMPT], list):
        prompt = messages_of(fields[_PROMPT], where, _PROMPT)
    else:
        prompt = (Message("user", text(fields, _PROMPT, where)),)
    if all(turns and turns[0].role == "assistant" for turns in answers):
        return prompt
    if all(any(turns[start : start + len(prompt)] == prompt for start in (0, 1)) for turns in answers):
        return None
    raise DataError(
        "The answers begin with another prompt than the one given.",
        path=where,
        key=_PROMPT,
        expected="answers that begin with an assistant turn, or conversations that begin with the prompt",
        actual=", ".join(
            f"{key}: {turns[0].role if turns else 'no'} turn" for key, turns in zip(_ANSWERS, answers, strict=True)
        ),
    )


def _different_questions(where: str, expected: str) -> DataError:
    return DataError(
        "The chosen and the rejected answer do not answer the same prompt.",
        path=where,
        key=CHOSEN,
        expected=expected,
        hint="give the prompt in a field prompt, and only the answers in chosen and rejected",
    )
