"""Runs a step in a separate process, so that its failure, time limit and memory do not affect other steps."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from scripts.gpu_check.findings import Finding
from scripts.gpu_check.scale import Scale

Work = Callable[[Scale], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the check.

    Attributes:
        name: Name for `--only`.
        work: Yields findings one by one, so that none are lost if it is stopped.
        seconds: Time limit.
        on_cpu: Whether the GPU is hidden from the step.
    """

    name: str
    work: Work
    seconds: int
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """The outcome of a step.

    Attributes:
        status: `done`, `failed` or `stopped`.
        seconds: Duration.
        error: The error message, if it failed.
    """

    status: str
    seconds: float
    error: str = ""


def run_isolated(step: Step, scale: Scale, seconds: float, tell: Callable[[Finding], None]) -> End:
    """Runs a step until it ends, fails or reaches its time limit.

    Args:
        step: The step.
        scale: Sizes for the step.
        seconds: Time limit.
        tell: Receives each finding as it arrives.
    """
    # A forked process cannot use CUDA; without CUDA, forking saves seconds of imports.
    context: Any = multiprocessing.get_context("fork" if scale.rehearses else "spawn")
    receiving, sending = context.Pipe(duplex=False)
    start_seconds = time.monotonic()
    process = context.Process(target=_work, args=(step, scale, sending))
    process.start()
    sending.close()
    status, error = "stopped", f"no end within {seconds:.0f} s"
    with contextlib.suppress(EOFError):
        while receiving.poll(max(0.0, start_seconds + seconds - time.monotonic())):
            status, error = "failed", "the process died"  # unless it reports a different outcome
            message = receiving.recv()
            if isinstance(message, End):
                status, error = message.status, message.error
                break
            tell(message)
            status, error = "stopped", f"no end within {seconds:.0f} s"
    process.join(timeout=5 if status == "done" else 0)
    if process.is_alive():
        process.kill()
    process.join()
    if status == "failed" and not error.startswith("Traceback"):
        error = f"{error}, exit code {process.exitcode}"
    return End(status, time.monotonic() - start_seconds, error)


def _work(step: Step, scale: Scale, sending: Connection) -> None:
    """Runs in the new process."""
    warnings.simplefilter("ignore")  # stdout is for findings, stderr for fatal errors
    if step.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with _emulation(wanted=scale.rehearses and not step.on_cpu):
            for finding in step.work(scale):
                sending.send(finding)
        sending.send(End("done", 0.0))
    except Exception:  # any error becomes one line of the report, and the next step runs
        sending.send(End("failed", 0.0, traceback.format_exc()))


@contextlib.contextmanager
def _emulation(*, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from tests.gpu_emulation.emulated_gpu import emulated_gpu

    with emulated_gpu():
        yield
