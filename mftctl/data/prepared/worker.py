"""A process that encodes examples for the process that started it: tasks on standard input, answers on its output."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import IO

from mftctl.data.prepared.encoding_tasks import EncodingSetup
from mftctl.data.prepared.worker_pool import receive, send


def serve(tasks: IO[bytes], answers: IO[bytes]) -> None:
    """Answers tasks until their stream ends.

    Args:
        tasks: The setup, then the tasks.
        answers: Receives the answer to each task, or the exception it raised.
    """
    try:
        setup: EncodingSetup = pickle.loads(receive(tasks))
        encode = setup.prepared()
        while True:
            task = pickle.loads(receive(tasks))
            try:
                answer: object = encode(task)
            except Exception as error:  # handed to the process that asked
                answer = error
            send(answers, pickle.dumps(answer))
    except EOFError:
        return


def main() -> None:
    """Serves the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one ends this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing printed here may mix with the answers
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
