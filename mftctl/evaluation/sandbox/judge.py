"""Judges programs in parallel, each in two supervised processes.

The candidate runs the model's code and only answers calls; the judge runs the test and reports to mftctl. The candidate
has access to neither the test nor the report, so it can pass only by answering correctly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox.clean_up import cleaned_up_after
from mftctl.evaluation.sandbox.kinds import Sandbox
from mftctl.evaluation.sandbox.program import Limits, Program, Verdict
from mftctl.evaluation.sandbox.supervise import judge_program


def judge_programs(
    sandbox: Sandbox,
    programs: Sequence[Program],
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Judges programs in parallel.

    Args:
        sandbox: The sandbox, from `find_sandbox`.
        programs: The programs to judge.
        limits: Limits of each program.
        workers: Number of programs in parallel; by default, the number of CPUs available to this process.
        on_progress: Called in the calling thread with the number of programs judged and the total.

    Returns:
        A verdict for each program, in the given order.

    Raises:
        SandboxError: A process could not be started, or `workers` is below 1.
    """
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count < 1:
        raise SandboxError("The number of workers must be at least 1.", key="workers", actual=workers)
    stopped = threading.Event()
    with cleaned_up_after(), ThreadPoolExecutor(count, thread_name_prefix="sandbox") as pool:
        futures = [pool.submit(judge_program, sandbox, program, limits, stopped) for program in programs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if on_progress is not None:
                    on_progress(done, len(programs))
        # Any exception, including an interruption, must stop the running programs first.
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
