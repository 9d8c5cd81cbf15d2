"""Recording how a command ended in the record of its run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mftctl.errors import ChangedDataError, Interrupted, LostProcessError, MftError, ServerError
from mftctl.experiments.run_folder import OPEN_RUNS, Run
from mftctl.experiments.run_record import RunStatus
from mftctl.files.atomic import is_failure_of_storage, known_failures

_RESUMABLE = (ChangedDataError, LostProcessError, ServerError)
"""Failures from outside, after which the saved state is still valid."""


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Records a failure of the block in the run's record; the exception propagates.

    A run that failed because of storage, a lost process or a server can be resumed from its last saved state.

    Raises:
        Interrupted: Ctrl-C, or a signal treated like it.
        StorageError: A file could not be written.
    """
    try:
        with known_failures(run.folder):
            yield
    except Interrupted as error:
        run.update(status=RunStatus.INTERRUPTED)
        if run.record.stage is not None:
            error.hint = how_to_go_on(run)
        raise
    except KeyboardInterrupt:
        run.update(status=RunStatus.INTERRUPTED)
        raise Interrupted("Stopped.", path=run.folder, hint=how_to_go_on(run)) from None
    except MftError as error:
        with suppress(OSError):  # if the record cannot be written, it remains as after a kill
            can_go_on = isinstance(error, _RESUMABLE) or is_failure_of_storage(error)
            run.update(status=RunStatus.INTERRUPTED if can_go_on else RunStatus.FAILED, error=str(error))
        raise
    finally:
        if run.record.status == RunStatus.RUNNING:  # an error unknown to mftctl
            with suppress(OSError):
                run.update(status=RunStatus.INTERRUPTED, error=f"{sys.exc_info()[0]}: {sys.exc_info()[1]}")


def how_to_go_on(run: Run) -> str:
    """Returns how to continue after a command was stopped outside of its steps."""
    record = run.record
    if record.stage is not None:
        return "the same mftctl run command resumes it"
    if record.command == "eval":
        return "the same command with --resume continues from the saved benchmark outputs"
    if record.command in ("fft", "probe", "mask-train"):
        return f"{run.resume_command} resumes it"
    return "the same command again; only its run folder was written"


def end_open_runs() -> None:
    """Marks all open runs as interrupted, for a command that ends outside of its work."""
    for run in list(OPEN_RUNS.values()):
        if (run.folder / "run.json").is_file():
            with suppress(OSError):
                run.update(status=RunStatus.INTERRUPTED)
