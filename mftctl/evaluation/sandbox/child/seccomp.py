"""A system call filter: calls that are not on the allow list are refused.

An allow list also refuses calls that future kernels add. Refused are, among others, sockets of every family, io_uring,
new processes and threads, running a program, tracing, other processes' memory, namespaces, mounts, keys, BPF, System V
shared memory, links, and changes to the mode, owner or times of a file, which Landlock does not cover.
"""

from __future__ import annotations

import ctypes
import os
import struct

from mftctl.evaluation.sandbox.child.syscall_numbers import ARCHITECTURES, NUMBERS, number_of

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

LOAD, JUMP_EQUAL, _AND, RETURN = 0x20, 0x15, 0x54, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_EPERM, _ENOSYS = 1, 38
_O_TRUNC, _O_ASYNC, _O_ACCMODE = 0o1000, 0o20000, 3
_TCGETS, _FIONCLEX, _FIOCLEX, _FIONREAD, _TIOCGWINSZ = 0x5401, 0x5450, 0x5451, 0x541B, 0x5413
_CHECKED = ("openat", "open", "fcntl", "ioctl", "kill", "tgkill", "prctl", "prlimit64", "clone3")

Instruction = tuple[int, int, int, int]


def install() -> None:
    """Permanently refuses every system call that is not on the list.

    Raises:
        OSError: The kernel rejects the filter, or the architecture is not supported.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(_ENOSYS, f"no system call filter for {machine}")
    program, _kept = program_of(assemble(machine, os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(program)),
    ):
        if libc.prctl(option, *arguments, 0, 0):
            raise OSError(ctypes.get_errno(), "the kernel rejected the system call filter")


def program_of(lines: Sequence[Instruction]) -> tuple[bytes, object]:
    """The filter program for the kernel, and the buffer that must stay alive until it is installed."""
    filters = b"".join(struct.pack("<HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    return struct.pack("@HP", len(lines), ctypes.addressof(buffer)), buffer


def assemble(machine: str, pid: int) -> list[Instruction]:
    """The filter's instructions for an architecture and the one process that may be sent signals."""
    lines: list[Instruction] = [
        (LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, _KILL_PROCESS),
        (LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for name in NUMBERS:
        number = number_of(name, machine)
        if number is None:
            continue
        decision = _check(name, pid) if name in _CHECKED else [(RETURN, 0, 0, ALLOW)]
        lines += [(JUMP_EQUAL, 0, len(decision), number), *decision]
    return [*lines, _refuse()]


def _check(name: str, pid: int) -> list[Instruction]:
    """The decision for a call that depends on its arguments."""
    if name == "clone3":  # glibc then falls back to clone and reports its result
        return [_refuse(_ENOSYS)]
    if name in ("openat", "open"):
        return _refuse_truncating_reads(2 if name == "openat" else 1)
    if name == "fcntl":
        # F_SETOWN and F_SETSIG send any signal to any process, and so does O_ASYNC.
        unsignalled = [*argument(2, _O_ASYNC), *_one_of(0)]
        plain = (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC)
        return [*argument(1), (JUMP_EQUAL, 0, len(unsignalled), _F_SETFL), *unsignalled, *_one_of(*plain)]
    if name == "ioctl":
        return [*argument(1), *_one_of(_TCGETS, _FIONCLEX, _FIOCLEX, _FIONREAD, _TIOCGWINSZ)]
    if name == "prctl":
        return [*argument(0), *_one_of(_PR_SET_NAME, _PR_GET_NAME)]
    if name == "prlimit64":  # may only query
        high = (LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * 2 + 4)
        return [*argument(2), (JUMP_EQUAL, 1, 0, 0), _refuse(), high, *_one_of(0)]
    return [*argument(0), *_one_of(pid)]


def _refuse_truncating_reads(flags_argument: int) -> list[Instruction]:
    """Refuses read-only opens with O_TRUNC: early versions of Landlock let them empty a read-only file."""
    return [
        *argument(flags_argument, _O_TRUNC | _O_ACCMODE),
        (JUMP_EQUAL, 1, 0, _O_TRUNC),
        (JUMP_EQUAL, 0, 1, _O_TRUNC | _O_ACCMODE),
        _refuse(),
        (RETURN, 0, 0, ALLOW),
    ]


def argument(index: int, mask: int | None = None) -> list[Instruction]:
    """Loads the lower half of an argument, optionally masked."""
    load = (LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * index)
    return [load] if mask is None else [load, (_AND, 0, 0, mask)]


def _one_of(*values: int) -> list[Instruction]:
    lines: list[Instruction] = []
    for value in values:
        lines += [(JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
    return [*lines, _refuse()]


def _refuse(code: int = _EPERM) -> Instruction:
    return (RETURN, 0, 0, _ERRNO | code)
