"""Processes that encode examples side by side, with results in order.

They are started as `python -m mftctl.data.prepared.worker`, not with `multiprocessing`: a fork would copy the threads'
locks of torch and CUDA, and a spawn would run an unguarded user script again.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any, TypeVar, cast

from mftctl.errors import DataError

_LENGTH = struct.Struct("<Q")
_AHEAD = 2
"""Tasks given out per process, so that none waits for the next."""

Result = TypeVar("Result")


class WorkerLostError(Exception):
    """A worker process ended before its answer."""


class Worker:
    """One process, used by one thread at a time.

    Args:
        setup: What it needs for every task, pickled.
    """

    def __init__(self, setup: bytes) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mftctl.data.prepared.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        with suppress(BrokenPipeError):  # told with the first task
            send(self._input, setup)

    @property
    def _input(self) -> IO[bytes]:
        return cast("IO[bytes]", self._process.stdin)

    def answer(self, task: object) -> Any:
        """The answer to a task.

        Raises:
            WorkerLostError: The process has ended.
            Exception: What the task raised.
        """
        try:
            send(self._input, pickle.dumps(task))
            answer = pickle.loads(receive(cast("IO[bytes]", self._process.stdout)))
        except (EOFError, OSError) as error:
            raise WorkerLostError(f"exit status {self._process.wait()}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._input.close()
        cast("IO[bytes]", self._process.stdout).close()


@contextmanager
def workers(count: int, setup: object) -> Iterator[WorkerPool]:
    """A pool of processes, ended with the block.

    Args:
        count: Number of processes.
        setup: What they need for every task; must be picklable.
    """
    content = pickle.dumps(setup)
    started = [Worker(content) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as threads:
            try:
                yield WorkerPool(started, threads)
            finally:
                for worker in started:  # also ends threads that wait for an answer
                    worker.stop()
    finally:
        for worker in started:
            worker.stop()


class WorkerPool:
    """Runs tasks on processes.

    Args:
        started: The processes.
        threads: As many threads.
    """

    def __init__(self, started: list[Worker], threads: ThreadPoolExecutor) -> None:
        self._count = len(started)
        self._threads = threads
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in started:
            self._idle.put(worker)

    def answers(self, tasks: Iterable[object]) -> Iterator[Any]:
        """The answers to the tasks in order; only a few are held at a time.

        Raises:
            DataError: A process was lost.
            Exception: What a task raised.
        """
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self._threads.submit(self._answer, task))
                if len(waiting) >= _AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except WorkerLostError as error:
            raise DataError(
                "A process that prepares the data was lost.",
                expected="an answer",
                actual=str(error),
                hint="check whether memory ran out (dmesg); prepare with one process: MFTCTL_DATA_PROCESSES=1",
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _answer(self, task: object) -> Any:
        worker = self._idle.get()
        try:
            return worker.answer(task)
        finally:
            self._idle.put(worker)


def send(stream: IO[bytes], content: bytes) -> None:
    """Writes a message with its length."""
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Reads a message.

    Raises:
        EOFError: The stream ends before the end of a message.
    """
    [length] = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return _exactly(stream, length)


def _exactly(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError("the stream ended within a message")
    return content
