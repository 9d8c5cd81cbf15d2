"""Programs to verdicts: two processes each, watched from outside, many programs at once.

Each program gets two processes: the candidate runs the model's code and only answers calls, the judge runs the test
and reports to mftctl. The candidate sees neither the test nor the way to report, so that it can pass only by
answering right.
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
    """Judges programs, many at once.

    Args:
        sandbox: Where they run, from `find_sandbox`.
        programs: What to judge.
        limits: What each may use.
        workers: How many at once; as many as this process has processors if not given.
        on_progress: Told, in the calling thread, how many of how many are judged.

    Returns:
        A verdict for each program, in the order given.

    Raises:
        SandboxError: A process could not be started, or `workers` is below 1.
    """
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count < 1:
        raise SandboxError("At least one program must run at a time.", key="workers", actual=workers)
    stopped = threading.Event()
    with cleaned_up_after(), ThreadPoolExecutor(count, thread_name_prefix="sandbox") as pool:
        futures = [pool.submit(judge_program, sandbox, program, limits, stopped) for program in programs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if on_progress is not None:
                    on_progress(done, len(programs))
        # Whatever ends the caller, an interruption included, is to end the running programs first.
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
