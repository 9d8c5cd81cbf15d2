"""The known failures of mftctl.

MftError
├── ConfigError          a recipe, an option or their combination (exit code 2)
│   └── OutputError          an output that is also an input, or would replace files of the user
├── DataError            a data file or one of its records
│   └── ChangedDataError     data that has changed since the run started
├── ModelError           an unusable checkpoint or tokenizer
├── MaskingError         layers, targets or scores that cannot be masked
├── MaskFileError        a mask file
│   ├── MaskFormatError      damaged, or not a mask file at all
│   └── MaskMismatchError    valid, but for a different model
├── TrainingError        training that cannot start or continue
│   └── LostProcessError     one of several processes was lost
├── DeviceMemoryError    not enough GPU memory
├── EvaluationError      a benchmark or a comparison
│   ├── MissingDataError     benchmark data that is not on this machine and cannot be downloaded
│   ├── ServerError          a server that cannot be reached or refuses a request
│   └── SandboxError         model-written code that cannot be run safely
├── RunError             a run folder
├── StorageError         a file that cannot be written
└── Interrupted          the user stopped a command; its state is saved (exit code 130)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class MftError(Exception):
    """A known failure: what, where, expected, got, what to do.

    Attributes:
        message: What went wrong, in one sentence without the details below.
        path: The file or folder concerned, with `:line` if known.
        key: The recipe key, option, tensor or record field concerned.
        expected: What would have been valid.
        actual: What was found.
        hint: What to do or type next.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        key: str | None = None,
        expected: object = None,
        actual: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.key = key
        self.expected = expected
        self.actual = actual
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        details = (
            ("where", self.path),
            ("key", self.key),
            ("expected", self.expected),
            ("got", self.actual),
            ("try", self.hint),
        )
        lines = [f"  {name}: {_continued(value)}" for name, value in details if value is not None]
        return "\n".join([_continued(self.message), *lines])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__)


def _continued(value: object) -> str:
    """Indents continuation lines of a value, so that a name with a line break cannot imitate a field."""
    return str(value).replace("\n", "\n    ")


def _rebuild(kind: type[MftError], fields: dict[str, object]) -> MftError:
    """Rebuilds an error in another process, as pickling does not preserve keyword-only arguments."""
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    error.args = (fields["message"],)
    return error


class ConfigError(MftError):
    """An invalid recipe or set of options, with every problem found."""

    exit_code = 2

    def __init__(self, message: str, *, problems: Sequence[str] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  - {_continued(problem)}" for problem in self.problems)])


class OutputError(ConfigError):
    """An output that is also an input, was not made by mftctl, or may not be replaced without consent."""


class DataError(MftError):
    """A data file, or one of its records, that cannot be used."""


class ChangedDataError(DataError):
    """The data of a resumed run has changed; the run can resume once the original data is restored."""


class ModelError(MftError):
    """A checkpoint, configuration or tokenizer that cannot be used."""


class MaskingError(MftError):
    """Layers, targets or scores that cannot be masked."""


class MaskFileError(MftError):
    """A mask file that cannot be used."""


class MaskFormatError(MaskFileError):
    """A mask file that is damaged, of an unknown version, or not a mask file at all."""


class MaskMismatchError(MaskFileError):
    """A valid mask file that was learned on a different model."""


class TrainingError(MftError):
    """Training that cannot start or continue."""


class LostProcessError(TrainingError):
    """One of several processes was lost and the others cannot continue; earlier saved state is valid."""


class DeviceMemoryError(MftError):
    """A GPU without enough memory for the requested work."""


class EvaluationError(MftError):
    """A benchmark or a comparison that cannot be computed."""


class MissingDataError(EvaluationError):
    """The data of a benchmark that is not on this machine and cannot be downloaded."""


class ServerError(EvaluationError):
    """A server that cannot be reached or refuses a request; the evaluation can resume with the answers so far."""


class SandboxError(EvaluationError):
    """Model-written code that cannot be run because no sandbox is available."""


class RunError(MftError):
    """A run folder that is missing, damaged or of the wrong kind."""


class StorageError(MftError):
    """A file that cannot be written: disk full, no permission, or a broken disk."""


class Interrupted(MftError):  # noqa: N818 - a request by the user, not an error
    """The user stopped the command; its state is saved."""

    exit_code = 130
