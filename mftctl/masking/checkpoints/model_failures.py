"""What libraries raise while they read the files of a model, as one known failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mftctl.errors import MftError, ModelError
from mftctl.runtime.torch_failures import is_out_of_memory
from mftctl.text import first_line

_RUST_PANIC = "PanicException"  # of pyo3, which has no name that could be imported


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
    """Turns whatever a library raises over the files of a model into a `ModelError`; a lack of memory stays itself.

    transformers, tokenizers and peft take the values of configurations on trust: one of another type, or out of
    bounds, comes out of their depths as any exception at all, some as a plain `Exception`, some as the panic of a
    library in Rust. So no list of classes would be complete, and inside there is to be nothing but their own calls.

    Args:
        message: What cannot be done, a sentence.
        path: The model.
        key: For the error.
        expected: For the error.
        hint: For the error.
        let_pass: What is raised as it is, beside known failures.

    Raises:
        ModelError: Something else was raised.
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
    """The first line of what an exception says, with its class where that alone tells what it is."""
    line, name = first_line(error), type(error).__name__
    tells = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return line if tells or line == name else f"{name}: {line}"
