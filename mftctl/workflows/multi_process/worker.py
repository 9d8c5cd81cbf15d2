"""A worker process of a command.

It reads its order from stdin, reports progress through its original stdout, and exits at once when the command has
ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from mftctl.errors import Interrupted, MftError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import Result
from mftctl.experiments.run_folder import Run, load_run
from mftctl.files.atomic import known_failures
from mftctl.runtime.process_group import join, leave
from mftctl.runtime.processes import is_first
from mftctl.runtime.signals import end_as_on_interrupt
from mftctl.workflows.multi_process.dispatch import work_here
from mftctl.workflows.multi_process.messages import Order, Speaker


def main() -> int:
    """Runs the worker and returns its exit code."""
    speaker = Speaker(_keep_stdout_apart(), tells=is_first())
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    end_as_on_interrupt()
    try:
        with known_failures(Path(order.folder)):
            run = load_run(Path(order.folder))
            speaker.result(run.record.command, _work(order, run, speaker))
    except MftError as error:
        speaker.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        stopped = Interrupted("Stopped.")
        speaker.error(stopped)
        return stopped.exit_code
    finally:
        leave()
    return 0


def _work(order: Order, run: Run, speaker: Speaker) -> Result:
    run.resumed_with = tuple(order.resumed_with)
    recipe = parse_recipe(order.recipe)
    source = ModelSource(**{**order.source, "parents": tuple(order.source["parents"])})
    join()
    return work_here(recipe, source, run, speaker, resume=order.resume, may_replace=order.may_replace)


def _keep_stdout_apart() -> int:
    """Returns a descriptor of the pipe to the command, and redirects the output of libraries to stderr."""
    pipe = os.dup(1)
    os.set_inheritable(pipe, False)
    os.dup2(2, 1)
    return pipe


def _end_with_the_command() -> None:
    """Kills this process when the command closes its end of stdin."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when Python exits
        pass
    os.kill(os.getpid(), signal.SIGKILL)
