"""Starts worker processes for a run, receives their messages, and ends them all when one is lost."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from mftctl.errors import Interrupted, LostProcessError, MftError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import BUILT_IN_FOLDER
from mftctl.experiments.recording import how_to_go_on
from mftctl.experiments.results import Result
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run
from mftctl.progress import Listener, Silence
from mftctl.runtime.process_group import SUPERVISED
from mftctl.runtime.signals import ENDING, is_heeded
from mftctl.runtime.stop_request import note_late_stop
from mftctl.workflows.multi_process.messages import Hearing, Order
from mftctl.workflows.multi_process.process_count import Launch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_GRACE_SECONDS = 10.0
"""Time for the others to report their error after one has ended early."""

_SHORT_GRACE_SECONDS = 2.0
"""The same if that one has reported its error."""

_LOOK_SECONDS = 0.2
_KILLED_AT = 3
"""The first Ctrl-C requests a stop after the step, the second an immediate stop; the third one kills."""

# Not `python -m`, which would look for modules in the current folder first.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop()); "
    "from mftctl.workflows.multi_process.worker import main; sys.exit(main())"
)
_HOME = Path(__file__).parents[3]


def work_together(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    launch: Launch,
    *,
    resume: bool,
    may_replace: bool,
) -> Result:
    """Runs the command of a run in several processes and returns its result.

    Their own output, such as library warnings, goes to `logs/` in the run folder, which is kept if they fail.

    Args:
        recipe: The resolved recipe.
        source: The source model.
        run: An open run, with the command in its record.
        listener: Receives progress updates.
        launch: A launch with at least two processes.
        resume: Whether to resume from the run's saved state.
        may_replace: Whether to replace a result at the run's output.

    Raises:
        MftError: The command failed, with the error of the first process to fail.
        LostProcessError: A process ended without reporting an error.
        KeyboardInterrupt: The user stopped it outside of training.
    """
    order = Order(str(run.folder), to_document(recipe), asdict(source), resume, may_replace, launch.words)
    logs = run.folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    try:
        with _started(launch, order, logs, listener) as team, team.hearing_signals():
            team.watch()
    finally:
        run.look_again()
    result = team.result(how_to_go_on(run))
    shutil.rmtree(logs, ignore_errors=True)
    return result


class _Team:
    """Worker processes of one command.

    Attributes:
        processes: The processes by rank.
    """

    def __init__(self, size: int, logs: Path, listener: Listener) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._logs = logs
        self._heard = [Hearing(Silence() if rank else listener) for rank in range(size)]
        self._failed: list[int] = []
        self._end_seconds: float | None = None
        self._received: list[int] = []

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Context in which signals that would end this process are forwarded to its workers, whose end then ends it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def pass_on(number: int, frame: FrameType | None) -> None:
            if number in ENDING and number in self._received:  # a terminal closes only once
                return
            self._received.append(number)
            kills = self._received.count(signal.SIGINT) >= _KILLED_AT
            self._send(signal.SIGKILL if kills else number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, *filter(is_heeded, ENDING))}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self) -> None:
        """Receives messages until all processes have ended."""
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(_pipe(process), selectors.EVENT_READ, rank)
            while selector.get_map() or any(process.poll() is None for process in self.processes):
                for key, _ in selector.select(_LOOK_SECONDS):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        self._heard[key.data].take(data)
                    else:
                        selector.unregister(key.fileobj)
                self._end_with_the_lost()

    def result(self, hint: str) -> Result:
        """Returns the result.

        Args:
            hint: How to continue if there is no result.

        Raises:
            MftError: The error reported by the first process to fail.
            LostProcessError: That process reported no error.
            KeyboardInterrupt: The user stopped the work, and no training has saved its state.
        """
        found = self._heard[0].result
        if found is not None:
            if self._received:
                note_late_stop()
            return found
        errors = [self._heard[rank].error for rank in (*self._failed, *range(len(self._heard)))]
        told = [error for error in errors if error is not None]
        if self._received:
            raise next((error for error in told if _says_how_to_go_on(error)), KeyboardInterrupt())
        raise next((error for error in told if not isinstance(error, LostProcessError)), None) or self._lost(hint)

    def end(self) -> None:
        """Kills all processes that are still running."""
        self._send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _end_with_the_lost(self) -> None:
        """Kills the others some time after one has failed."""
        if self._end_seconds is not None and time.monotonic() > self._end_seconds:
            self._send(signal.SIGKILL)
            return
        for rank, process in enumerate(self.processes):
            if rank not in self._failed and (self._heard[rank].error is not None or process.poll() not in (None, 0)):
                self._failed.append(rank)
                error = self._heard[rank].error
                told = error is not None and not isinstance(error, (Interrupted, LostProcessError))
                self._end_seconds = min(
                    self._end_seconds or float("inf"),
                    time.monotonic() + (_SHORT_GRACE_SECONDS if told else _GRACE_SECONDS),
                )

    def _lost(self, hint: str) -> MftError:
        """Returns the error for a process that ended without reporting one."""
        silent = [rank for rank in self._failed if self._heard[rank].error is None]
        # A killed process makes the others fail a moment later.
        silent.sort(key=lambda rank: self.processes[rank].returncode >= 0)
        rank = (*silent, *self._failed, 0)[0]
        code = self.processes[rank].returncode
        log = _log(self._logs, rank)
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else words[-1] if words else f"exit code {code}"
        return LostProcessError(
            "A process ended before its work was done, so the others were stopped.",
            path=log,
            actual=f"process {rank + 1} of {len(self.processes)}: {how}",
            hint=hint,
        )


def _says_how_to_go_on(error: MftError) -> bool:
    return isinstance(error, Interrupted) and error.hint is not None


@contextmanager
def _started(launch: Launch, order: Order, logs: Path, listener: Listener) -> Iterator[_Team]:
    """Yields running processes; none of them outlives the block."""
    store = _store()
    environment = _environment(launch, store.port)
    team = _Team(launch.processes, logs, listener)
    try:
        for rank in range(launch.processes):
            with _log(logs, rank).open("wb") as log:
                team.processes.append(_start({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log))
                _give(order, team.processes[-1])
        yield team
    finally:
        team.end()


def _start(environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, str(_HOME)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        bufsize=0,
        start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
    )


def _give(order: Order, process: subprocess.Popen[bytes]) -> None:
    """Sends a process its order; one that has ended already is noticed by the watch, like any other."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.write(order.line())


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdout is None:
        raise ValueError("a process was started without a pipe")
    return process.stdout


def _log(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank + 1}.txt"


def _store() -> TCPStore:
    """Returns the store through which the processes connect; kept here so that it outlives all of them."""
    from datetime import timedelta

    from torch._C._distributed_c10d import TCPStore

    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)


def _environment(launch: Launch, port: int) -> dict[str, str]:
    """Returns the environment that `accelerate launch` would set for the shard's configuration, except the rank."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import check_cuda_p2p_ib_support
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    configuration = BUILT_IN_FOLDER / "accelerate" / f"{launch.shard}.yaml"
    asked = ["--config_file", str(configuration), "--num_processes", str(launch.processes)]
    arguments, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*asked, "--main_process_port", "0", "mftctl"])
    )
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # set by accelerate for its own launcher
        environment.pop(name, None)
        if name in os.environ:
            environment[name] = os.environ[name]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.processes)))
    if not check_cuda_p2p_ib_support():
        environment.setdefault("NCCL_P2P_DISABLE", "1")
        environment.setdefault("NCCL_IB_DISABLE", "1")
    told: dict[str, str] = environment | {
        "WORLD_SIZE": str(launch.processes),
        "LOCAL_WORLD_SIZE": str(launch.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SUPERVISED: "1",
    }
    return told
