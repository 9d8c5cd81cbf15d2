"""Turns whatever libraries raise while reading a model's files into a `ModelError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mftctl.errors import MftError, ModelError
from mftctl.runtime.torch_failures import is_out_of_memory
from mftctl.text import first_line

_RUST_PANIC = "PanicException"  # from pyo3; it cannot be imported


@contextmanager
def model_failures(
    message: str,
    *,
    path: Path | str | None,
    key: str | None = None,
    expected: str | None = None,
    hint: str | None = None,
    let_pass: type[Exception] = MftError,
) -> Iterator[None]:
    """Turns whatever a library raises while reading a model's files into a `ModelError`, except a `MemoryError`.

    transformers, tokenizers and peft do not validate configuration values: a value of the wrong type or out of range
    can surface as any exception, sometimes a plain `Exception`, sometimes a panic in a Rust library. No list of
    classes would be complete, so the context must contain nothing but calls into these libraries.

    Args:
        message: The failure as one sentence.
        path: The model.
        key: Passed to the error.
        expected: Passed to the error.
        hint: Passed to the error.
        let_pass: An exception class to re-raise unchanged, in addition to known failures.

    Raises:
        ModelError: Anything else was raised.
    """
    try:
        yield
    except (MftError, let_pass):
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == _RUST_PANIC):
            raise
        raise ModelError(message, path=path, key=key, expected=expected, actual=reason_of(error), hint=hint) from error


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, with its class where the message alone is unclear."""
    line, name = first_line(error), type(error).__name__
    tells = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return line if tells or line == name else f"{name}: {line}"
