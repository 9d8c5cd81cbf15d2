"""Asks mftctl before a path is looked up or a file is created: the kernel suspends the call until it is answered.

A system call filter sees only numbers. Paths and the number of created files must be checked by a process that the
kernel notifies; a call that nobody answers fails.
"""

from __future__ import annotations

import _socket  # socket takes long to load
import ctypes
import os
import struct

from mftctl.evaluation.sandbox.child.seccomp import ALLOW, JUMP_EQUAL, LOAD, RETURN, argument, program_of
from mftctl.evaluation.sandbox.child.syscall_numbers import ARCHITECTURES, number_of

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from mftctl.evaluation.sandbox.child.seccomp import Instruction

_NOTIFY = 0x7FC00000
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_PR_SET_NO_NEW_PRIVS = 38
MAKING_FLAGS = 0o100 | 0o20000000
"""O_CREAT, and the bit of O_TMPFILE that is not O_DIRECTORY."""

PATHS: dict[str, tuple[tuple[int | None, int], ...]] = {
    "openat": ((0, 1),),
    "open": ((None, 0),),
    "stat": ((None, 0),),
    "lstat": ((None, 0),),
    "newfstatat": ((0, 1),),
    "statx": ((0, 1),),
    "access": ((None, 0),),
    "faccessat": ((0, 1),),
    "faccessat2": ((0, 1),),
    "readlink": ((None, 0),),
    "readlinkat": ((0, 1),),
    "chdir": ((None, 0),),
    "mkdir": ((None, 0),),
    "mkdirat": ((0, 1),),
    "rmdir": ((None, 0),),
    "unlink": ((None, 0),),
    "unlinkat": ((0, 1),),
    "rename": ((None, 0), (None, 1)),
    "renameat": ((0, 1), (2, 3)),
    "renameat2": ((0, 1), (2, 3)),
}
"""Calls that take paths: for each path, the argument positions of its base folder and of the path itself."""

OPENING: dict[str, int] = {"openat": 2, "open": 1}
"""Calls that create a file depending on their flags: the argument position of the flags."""

MAKING = ("mkdir", "mkdirat")


def install(gate_fd: int, *, asks_for_paths: bool) -> None:
    """Makes the kernel notify mftctl of system calls, and sends mftctl the listener.

    Args:
        gate_fd: A socket to mftctl; it is closed afterwards.
        asks_for_paths: Whether to check every path, or only the creation of files and folders.

    Raises:
        OSError: The kernel refuses, for example because another process is already the listener.
    """
    machine = os.uname().machine
    if machine not in _SECCOMP:
        raise OSError(f"no system call notifications for {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    program, _kept = program_of(assemble(machine, asks_for_paths=asks_for_paths))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    number = ctypes.c_long(_SECCOMP[machine])
    listener = libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.c_char_p(program))
    if listener < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"the kernel refused system call notifications: {os.strerror(code)}")
    gate = _socket.socket(fileno=gate_fd)
    gate.sendmsg([b"!"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("@i", listener))])
    gate.close()
    os.close(listener)


def assemble(machine: str, *, asks_for_paths: bool) -> list[Instruction]:
    """The filter's instructions; calls that they do not notify about are decided by the filter installed next."""
    lines: list[Instruction] = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, 0),
    ]
    for name in PATHS if asks_for_paths else (*OPENING, *MAKING):
        number = number_of(name, machine)
        if number is None:
            continue
        decision = [(RETURN, 0, 0, _NOTIFY)]
        if not asks_for_paths and name in OPENING:
            flags = argument(OPENING[name], MAKING_FLAGS)
            decision = [*flags, (JUMP_EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), *decision]
        lines += [(JUMP_EQUAL, 0, len(decision), number), *decision]
    return [*lines, (RETURN, 0, 0, ALLOW)]
