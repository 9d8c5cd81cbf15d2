"""Runs a step in a process of its own: its failure, its time limit and its memory end with it."""

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
    """A part of the check.

    Attributes:
        name: As `--only` takes it.
        work: Yields findings one by one, so that a stop loses none.
        seconds: It is stopped after so many.
        on_cpu: Whether the GPU is hidden from it.
    """

    name: str
    work: Work
    seconds: int
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """How a step ended.

    Attributes:
        status: `done`, `failed` or `stopped`.
        seconds: It took.
        error: What it failed with.
    """

    status: str
    seconds: float
    error: str = ""


def run_isolated(step: Step, scale: Scale, seconds: float, tell: Callable[[Finding], None]) -> End:
    """Runs a step to its end, its failure or its limit.

    Args:
        step: The step.
        scale: Its sizes.
        seconds: Its limit.
        tell: Gets each finding as it comes.
    """
    # A process that was forked could not use CUDA; without CUDA, forking saves seconds of imports.
    context: Any = multiprocessing.get_context("fork" if scale.rehearses else "spawn")
    receiving, sending = context.Pipe(duplex=False)
    start_seconds = time.monotonic()
    process = context.Process(target=_work, args=(step, scale, sending))
    process.start()
    sending.close()
    status, error = "stopped", f"no end within {seconds:.0f} s"
    with contextlib.suppress(EOFError):
        while receiving.poll(max(0.0, start_seconds + seconds - time.monotonic())):
            status, error = "failed", "the process died"  # unless it says otherwise
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
    """In the new process."""
    warnings.simplefilter("ignore")  # stdout is for findings, and stderr for what ends the check
    if step.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with _emulation(wanted=scale.rehearses and not step.on_cpu):
            for finding in step.work(scale):
                sending.send(finding)
        sending.send(End("done", 0.0))
    except Exception:  # whatever it is, it is one line of the report, and the next step goes on
        sending.send(End("failed", 0.0, traceback.format_exc()))


@contextlib.contextmanager
def _emulation(*, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from tests.gpu_emulation.emulated_gpu import emulated_gpu

    with emulated_gpu():
        yield
