"""A process with all imports done, from which modules run as if by `python -m`, each in a forked process.

A command thus costs its work alone, where starting Python and importing takes longer than a tiny training. Tests start
`tests/forked_commands/forward.py` as they would start Python; it sends its own environment here and stands for the
forked process.
"""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_ORDER_BYTES = 1 << 17
STREAMS = ("stdin", "stdout", "stderr")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KNOWN_THREADS = {"jemalloc_bg_thd"}
"""Threads of libraries that can be forked."""


@dataclass(frozen=True)
class Order:
    """What a forked process runs, as `forward.py` sends it.

    Attributes:
        arguments: The module and its arguments.
        environment: All environment variables.
        folder: Working folder.
        ignored: Numbers of the signals in `SIGNALS` that the process starts with as ignored.
        streams: Descriptors of standard input, output and error; None for those that are closed.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    ignored: list[int]
    streams: list[int | None]


def import_everything() -> None:
    """Imports the modules that commands import when called, under the settings that `main` makes."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # looking for a GPU in another way would forbid its use after a fork
    )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import mftctl.cli.app
    import mftctl.cli.apply
    import mftctl.cli.average
    import mftctl.cli.eval
    import mftctl.cli.fft
    import mftctl.cli.interpolate
    import mftctl.cli.mask_train
    import mftctl.cli.probe
    import mftctl.cli.report
    import mftctl.cli.run
    import mftctl.workflows.apply
    import mftctl.workflows.average
    import mftctl.workflows.eval
    import mftctl.workflows.fft
    import mftctl.workflows.interpolate
    import mftctl.workflows.mask_train
    import mftctl.workflows.multi_process.worker
    import mftctl.workflows.probe
    import mftctl.workflows.run  # noqa: F401
    from mftctl.runtime.process_group import import_deepspeed

    import_deepspeed()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def require_one_thread() -> None:
    """Checks that no thread is lost in a fork.

    Raises:
        RuntimeError: There is one.
    """
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = {(task / "comm").read_text().strip() for task in others}
    if threading.active_count() > 1 or names - _KNOWN_THREADS:
        raise RuntimeError(f"the server has other threads: {names}, {threading.enumerate()}")


class Server:
    """Forks a process for each connection, and reports its id and its end there.

    A connection that is closed kills its process.

    Args:
        address: Path of the socket to listen on.
    """

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen()
        self._events = selectors.DefaultSelector()
        self._events.register(self._listener, selectors.EVENT_READ)
        self._events.register(0, selectors.EVENT_READ)
        self._processes: dict[socket.socket, int] = {}
        self._ends: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> Order | None:
        """Returns an order in each forked process, and None in this one when standard input ends."""
        while True:
            for event, _ in self._events.select():
                found = event.fileobj
                if found == 0:
                    for process in self._processes.values():
                        os.kill(process, signal.SIGKILL)
                    return None
                if found is self._listener:
                    order = self._fork()
                    if order is not None:
                        return order
                elif isinstance(found, int):
                    self._report(found)
                elif isinstance(found, socket.socket) and found in self._processes:
                    os.kill(self._processes[found], signal.SIGKILL)
                    self._events.unregister(found)

    def _fork(self) -> Order | None:
        connection, _ = self._listener.accept()
        text, descriptors, *_ = socket.recv_fds(connection, LARGEST_ORDER_BYTES, len(STREAMS))
        require_one_thread()
        process = os.fork()
        if process == 0:
            self._close()
            connection.close()
            return read_order(json.loads(text), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(process).encode())
        self._processes[connection] = process
        end = os.pidfd_open(process)
        self._ends[end] = process, connection
        for watched in (connection, end):
            self._events.register(watched, selectors.EVENT_READ)
        return None

    def _report(self, end: int) -> None:
        process, connection = self._ends.pop(end)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self._events.unregister(end)
        os.close(end)
        if connection in self._events.get_map():
            self._events.unregister(connection)
            connection.send(str(code).encode())
        del self._processes[connection]
        connection.close()

    def _close(self) -> None:
        self._events.close()
        self._listener.close()
        for end in self._ends:
            os.close(end)
        for connection in self._processes:
            connection.close()


def read_order(fields: dict[str, Any], descriptors: list[int]) -> Order:
    """The order in a message and the descriptors sent with it, which leave out closed streams."""
    remaining = iter(descriptors)
    streams = [next(remaining) if is_open else None for is_open in fields.pop("open")]
    return Order(**fields, streams=streams)


def become(order: Order) -> None:
    """Gives this process the state that Python would start with."""
    import numpy
    import torch

    os.setpgid(0, 0)
    for number in SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order.ignored else usual)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    numpy.random.seed()
    torch.seed()
    for number, (name, descriptor) in enumerate(zip(STREAMS, order.streams, strict=True)):
        if descriptor is None:
            os.close(number)
            stream = None
        else:
            os.dup2(descriptor, number)
            os.close(descriptor)
            stream = open_stream(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = order.arguments
    sys.path[0] = order.folder


def open_stream(number: int) -> io.TextIOWrapper:
    """A standard stream as Python opens it."""
    file = open(number, "wb" if number else "rb", closefd=False)
    usual = getattr(sys, f"__{STREAMS[number]}__")
    at_once = usual.write_through  # under PYTHONUNBUFFERED
    lines = not at_once and (number == 2 or file.isatty())
    return io.TextIOWrapper(
        file, encoding=usual.encoding, errors=usual.errors, line_buffering=lines, write_through=at_once
    )


def main() -> None:
    """Serves until standard input ends; in a forked process, runs its module and ends as Python does."""
    server = Server(sys.argv[1])
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    import_everything()
    order = server.serve()
    if order is not None:
        become(order)
        runpy.run_module(order.arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
