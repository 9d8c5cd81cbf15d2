"""Resource limits for chat templates, which are programs written by the model's author."""

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
"""Exceptions that template code raises."""

_MEMORY_FILE = Path("/proc/self/statm")
_AGAIN_SECONDS = 1.0
"""Time to the next alarm, in case the first is raised where exceptions are swallowed, such as in a destructor."""

_context = threading.local()
"""Whether this thread is within `template_limits`."""


class _TimeUp(BaseException):
    """The time limit is exceeded."""


def render_template(
    turns: Sequence[Mapping[str, Any]], template: str, *, marked: bool = False, **variables: Any
) -> tuple[str, list[list[tuple[int, int]]]]:
    """The rendered conversation and, on request, the spans that the template marks as generated.

    Args:
        turns: The conversation.
        template: The chat template.
        marked: Whether to return the spans.
        variables: Further variables for the template.

    Raises:
        ModelError: The template exceeds the limit on time, memory or output length.
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
    """Wraps a function that renders a chat template, so that it runs within the limits.

    Args:
        render: A function such as a tokenizer's `apply_chat_template`. Template errors become a `DataError`.
    """

    def rendered(*args: Any, **options: Any) -> Any:
        try:
            with template_limits():
                return render(*args, **options)
        except TEMPLATE_FAILURES as error:
            raise DataError(
                "The tokenizer's chat template fails on a prompt.",
                key="chat_template",
                expected="roles in an order that the template accepts",
                actual=first_line(error),
                hint="omit --chat-template, or choose another template",
            ) from error

    return rendered


@contextmanager
def template_limits() -> Iterator[None]:
    """Stops chat templates that take too long or too much memory while the context is open.

    The time limit is CPU time and applies only in the main thread; the memory limit is address space and applies only
    on Linux. It is shared by all threads, so none of them should allocate much meanwhile.

    Within another such context, only the time starts again: setting the limits for each of many records takes longer
    than rendering them.

    Raises:
        ModelError: The limit on time or memory is exceeded.
    """
    if getattr(_context, "is_open", False):
        _restart_time()
        yield
        return
    _context.is_open = True
    try:
        with _limited_time(), _limited_memory():
            yield
    except _TimeUp as error:
        raise _exceeded(f"more than {MOST_SECONDS:g} s") from error
    except MemoryError as error:
        raise _exceeded("more memory than allowed") from error
    finally:
        _context.is_open = False


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    _restart_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _restart_time() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, _AGAIN_SECONDS)


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
        "The model's chat template exceeds the resource limits.",
        key="chat_template",
        expected=f"at most {MOST_SECONDS:g} s, {MOST_BYTES >> 20} MiB and {MOST_CHARACTERS:,} characters",
        actual=what,
        hint="choose another template with --chat-template; do not trust this model",
    )
