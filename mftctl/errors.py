"""Every failure mftctl knows by name.

MftError
├── ConfigError          a recipe, an option or their combination (exit code 2)
│   └── OutputError          an output that is an input, or would replace what is the user's
├── DataError            a data file or one of its records
│   └── ChangedDataError     data that is not what a run began with
├── ModelError           a checkpoint or a tokenizer that cannot be used
├── MaskingError         layers, targets or scores that cannot be masked
├── MaskFileError        a mask file
│   ├── MaskFormatError      it is damaged or not a mask file at all
│   └── MaskMismatchError    it is sound, but belongs to another model
├── TrainingError        a training that cannot start or go on
│   └── LostProcessError     one of several processes is gone
├── DeviceMemoryError    a GPU without room
├── EvaluationError      a benchmark or a comparison
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
        message: What went wrong, one sentence without the details below.
        path: The file or folder concerned, with `:line` where that is known.
        key: The recipe key, option, tensor or record field concerned.
        expected: What would have been right.
        actual: What was found.
        hint: The next thing to do or to type.
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
    """A value whose further lines stand apart from the fields, lest a name with a line end pass for one."""
    return str(value).replace("\n", "\n    ")


def _rebuild(kind: type[MftError], fields: dict[str, object]) -> MftError:
    """The same error in another process: keyword-only arguments do not survive pickling by themselves."""
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    error.args = (fields["message"],)
    return error


class ConfigError(MftError):
    """A recipe or a set of options that does not fit, with every problem found."""

    exit_code = 2

    def __init__(self, message: str, *, problems: Sequence[str] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  - {_continued(problem)}" for problem in self.problems)])


class OutputError(ConfigError):
    """An output that is an input, or would replace what mftctl did not make or the user did not agree to replace."""


class DataError(MftError):
    """A data file, or one record of it, that cannot be used."""


class ChangedDataError(DataError):
    """The data of a run that goes on is not what it began with; with that put back, it can go on."""


class ModelError(MftError):
    """A checkpoint, configuration or tokenizer that cannot be used."""


class MaskingError(MftError):
    """Layers, targets or scores that cannot be masked."""


class MaskFileError(MftError):
    """A mask file that cannot be used."""


class MaskFormatError(MaskFileError):
    """A mask file that is damaged, of an unknown version, or no mask file at all."""


class MaskMismatchError(MaskFileError):
    """A sound mask file that was learned on another model."""


class TrainingError(MftError):
    """A training that cannot start or cannot go on."""


class LostProcessError(TrainingError):
    """One of several processes is gone, and the others cannot go on; what was saved before is sound."""


class DeviceMemoryError(MftError):
    """A GPU without room for what was asked of it."""


class EvaluationError(MftError):
    """A benchmark or a comparison that cannot be computed."""


class SandboxError(EvaluationError):
    """Model-written code that cannot be run because nothing here would confine it."""


class RunError(MftError):
    """A run folder that is missing, damaged or of the wrong kind."""


class StorageError(MftError):
    """A file that cannot be written: no room, no permission, a broken disk."""


class Interrupted(MftError):  # noqa: N818 - a request by the user, not an error of theirs
    """The user stopped the command; its state is saved."""

    exit_code = 130
