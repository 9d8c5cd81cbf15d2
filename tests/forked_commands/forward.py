"""Stands for a process of `tests.forked_commands.server`: forwards signals to it, and ends as it ends.

forward.py SOCKET MODULE ARGUMENTS
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Has the module run, and ends with its exit code or its signal."""
    address, *arguments = sys.argv[1:]
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    is_open = [getattr(sys, name) is not None for name in ("stdin", "stdout", "stderr")]
    order = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - pathlib takes as long to import as all else here
        "ignored": ignored,
        "open": is_open,
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    descriptors = [number for number, here in enumerate(is_open) if here]
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    socket.send_fds(connection, [json.dumps(order).encode()], descriptors)
    process = int(connection.recv(64))

    def forward(number: int, frame: FrameType | None) -> None:
        try:
            os.kill(process, number)
        except ProcessLookupError:  # it has ended, and its code is on its way
            pass

    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = int(connection.recv(64))
    if code >= 0:
        os._exit(code)
    if -code in FORWARDED:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main()
