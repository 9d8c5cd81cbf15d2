"""How a run's record says that its command ended, whatever ended it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mftctl.errors import ChangedDataError, Interrupted, LostProcessError, MftError
from mftctl.experiments.run_folder import OPEN_RUNS, Run
from mftctl.files.atomic import is_failure_of_storage, known_failures


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Keeps a failure of the block in the run's record; the exception goes on.

    A run that failed for want of storage, or of one of its processes, can be resumed from what it saved before.

    Raises:
        Interrupted: Ctrl-C, or a signal that counts as it.
        StorageError: A file could not be written.
    """
    try:
        with known_failures(run.folder):
            yield
    except Interrupted:
        run.update(status="interrupted")
        raise
    except KeyboardInterrupt:
        run.update(status="interrupted")
        raise Interrupted("Stopped.", path=run.folder, hint=how_to_go_on(run)) from None
    except MftError as error:
        with suppress(OSError):  # without room for the record it says what that of a killed run says
            can_go_on = isinstance(error, (LostProcessError, ChangedDataError)) or is_failure_of_storage(error)
            run.update(status="interrupted" if can_go_on else "failed", error=str(error))
        raise
    finally:
        if run.record.status == "running":  # an error that mftctl does not know
            with suppress(OSError):
                run.update(status="interrupted", error=f"{sys.exc_info()[0]}: {sys.exc_info()[1]}")


def how_to_go_on(run: Run) -> str:
    """What to do after a command was stopped outside of its steps."""
    record = run.record
    if record.stage is not None:
        return "the same mftctl run goes on with it"
    if record.command == "eval":
        return "the same command with --resume goes on with the outputs of benchmarks that were kept"
    if record.command in ("fft", "probe", "mask-train"):
        return f"{run.resume_command} takes it up again"
    return "the same command once more; nothing was written but its run folder"


def end_open_runs() -> None:
    """Has no record say that this process works on it; for a command that ends outside of its work."""
    for run in list(OPEN_RUNS.values()):
        if (run.folder / "run.json").is_file():
            with suppress(OSError):
                run.update(status="interrupted")
