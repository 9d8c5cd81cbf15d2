"""Bounds on what a chat template may take: it is a program, written by whoever made the model."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from mftctl.errors import DataError, ModelError
from mftctl.text import first_line

MOST_SECONDS: Final = 5.0
MOST_BYTES: Final = 2**29
MOST_CHARACTERS: Final = 2**24

TEMPLATE_FAILURES: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
)
"""What the code of a template raises."""

_MEMORY_FILE = Path("/proc/self/statm")
_AGAIN_SECONDS = 1.0
"""Until the next alarm, where the first was raised in a place that exceptions do not leave, such as a destructor."""


class _TimeUp(BaseException):
    """The time is up."""


def render_template(
    turns: Sequence[Mapping[str, Any]], template: str, *, marked: bool = False, **variables: Any
) -> tuple[str, list[list[tuple[int, int]]]]:
    """The text that a chat template makes of a conversation, and where it marks what is generated if that is wanted.

    Args:
        turns: The conversation.
        template: The chat template.
        marked: Whether the places are wanted.
        variables: What else the template reads.

    Raises:
        ModelError: It takes too long, or too much memory, or its text is too long.
        Exception: One of `TEMPLATE_FAILURES`.
    """
    with template_limits():
        texts, spans = cast(
            "tuple[list[str], list[list[tuple[int, int]]]]",
            render_jinja_template(
                conversations=[[dict(turn) for turn in turns]],
                chat_template=template,
                return_assistant_tokens_mask=marked,
                **variables,
            ),
        )
    if len(texts[0]) > MOST_CHARACTERS:
        raise _exceeded(f"a text of {len(texts[0]):,} characters")
    return texts[0], spans


def limited(render: Callable[..., Any]) -> Callable[..., Any]:
    """A function that renders a chat template, within the bounds.

    Args:
        render: Such as a tokenizer's `apply_chat_template`. What the template raises becomes a `DataError`.
    """

    def rendered(*args: Any, **options: Any) -> Any:
        try:
            with template_limits():
                return render(*args, **options)
        except TEMPLATE_FAILURES as error:
            raise DataError(
                "The chat template of the tokenizer fails on a prompt.",
                key="chat_template",
                expected="roles in an order that the template takes",
                actual=first_line(error),
                hint="leave --chat-template out, or choose another template",
            ) from error

    return rendered


@contextmanager
def template_limits() -> Iterator[None]:
    """Inside it, a chat template that takes too long or too much memory ends with an error.

    The time is that of the processor, and is watched in the main thread alone; memory is address space, which Linux
    counts. Other threads have the same room, so that nothing large is to be done by them meanwhile.

    Raises:
        ModelError: The time is up, or there is no more memory.
    """
    try:
        with _limited_time(), _limited_memory():
            yield
    except _TimeUp as error:
        raise _exceeded(f"more than {MOST_SECONDS:g} s") from error
    except MemoryError as error:
        raise _exceeded("more memory than that") from error


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: object) -> NoReturn:
    raise _TimeUp


@contextmanager
def _limited_memory() -> Iterator[None]:
    if not _MEMORY_FILE.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(_MEMORY_FILE.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + MOST_BYTES
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _exceeded(what: str) -> ModelError:
    return ModelError(
        "The chat template of the model takes more than a template may.",
        key="chat_template",
        expected=f"at most {MOST_SECONDS:g} s, {MOST_BYTES >> 20} MiB and {MOST_CHARACTERS:,} characters",
        actual=what,
        hint="choose another template with --chat-template; do not trust a model with such a one",
    )
