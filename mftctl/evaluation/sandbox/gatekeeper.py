"""Answers the system calls that the kernel holds until mftctl has looked at them: what is made, and what paths name."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox.child.gate import MAKING, MAKING_FLAGS, OPENING, PATHS
from mftctl.evaluation.sandbox.child.syscall_numbers import number_of
from mftctl.evaluation.sandbox.visible_paths import VisiblePaths

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NOTICE = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_MOST_PATH_BYTES = 4096
_CURRENT_FOLDER = -100
_NOT_FOLLOWED = {"newfstatat": 3, "statx": 2, "faccessat2": 3}
"""Where the flags stand that say so."""
_AT_SYMLINK_NOFOLLOW = 0x100
_FOLLOWING = ("openat", "open", "stat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "chdir")
_NAMES = {number_of(name, platform.machine()): name for name in PATHS}


def receive_listener(gate: socket.socket) -> int | None:
    """Where the calls of the process behind a gate arrive; None if it ended before it said so.

    Args:
        gate: This end of the socket that the process was given.
    """
    _, fds, _, _ = socket.recv_fds(gate, 1, 1)
    return fds[0] if fds else None


@dataclass(slots=True)
class Gatekeeper:
    """Answers the calls of one process, which runs a single thread and so cannot change what is looked at meanwhile.

    Attributes:
        listener: Where they arrive.
        pid: Of the process.
        memory: From `open_memory`; read only where paths are looked at.
        most_made: How often it may make a file or folder.
        visible: What of this machine it may name; None where a name space of its own leaves nothing else to name.
        made: How often it has.
    """

    listener: int
    pid: int
    memory: int
    most_made: int
    visible: VisiblePaths | None
    made: int = 0

    @property
    def too_much_made(self) -> bool:
        """Whether it made, or asked to make, more files and folders than it may."""
        return self.made > self.most_made

    def answer(self) -> bool:
        """Answers the calls that wait; False when there will be none any more."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        while found := poll.poll(0):
            if not found[0][1] & select.POLLIN:
                return False
            notice = bytearray(_NOTICE.size)
            try:
                _control(self.listener, _RECEIVE, notice)
            except FileNotFoundError:  # a signal took the process out of the call, or ended it
                continue
            number, _, _, call, _, _, *arguments = _NOTICE.unpack(notice)
            code = self._refusal(_NAMES.get(call, ""), arguments)
            answer = _ANSWER.pack(number, 0, -code, 0 if code else _CONTINUE)
            with suppress(FileNotFoundError):
                _control(self.listener, _SEND, bytearray(answer))
        return True

    def _refusal(self, name: str, arguments: list[int]) -> int:
        """The error that a call gets; 0 if it may go on."""
        if name in MAKING or (name in OPENING and arguments[OPENING[name]] & MAKING_FLAGS):
            self.made += 1
            if self.too_much_made:
                return errno.EDQUOT
        if self.visible is None:
            return 0
        follows = _follows(name, arguments)
        for folder, path in PATHS.get(name, ()):
            start = _CURRENT_FOLDER if folder is None else arguments[folder]
            code = self._refused_path(start, arguments[path], self.visible, follows=follows)
            if code:
                return code
        return 0 if name in PATHS else errno.EPERM

    def _refused_path(self, start: int, address: int, visible: VisiblePaths, *, follows: bool) -> int:
        content = self._text_at(address)
        if content is None:
            return errno.EFAULT
        path, end, _ = content.partition(b"\0")
        if not end:
            return errno.ENAMETOOLONG
        if not path:  # what an open file is asked for
            return 0
        if not path.startswith(b"/"):
            fd = (start & 0xFFFFFFFF) - (1 << 32 if start & 1 << 31 else 0)
            where = "cwd" if fd == _CURRENT_FOLDER else f"fd/{fd}"
            try:
                path = bytes(Path(f"/proc/{self.pid}/{where}").readlink()) + b"/" + path
            except OSError:  # no such file, or a folder whose path is too long
                return errno.ENOENT
        return 0 if visible.shows(os.fsdecode(path), follows=follows) else errno.ENOENT

    def _text_at(self, address: int) -> bytes | None:
        """What lies in the memory of the process; None where there is none."""
        try:
            return os.pread(self.memory, _MOST_PATH_BYTES, address)
        except (OSError, OverflowError):
            return None


def open_memory(pid: int) -> int:
    """A file in which the memory of a process can be read; -1 if it has ended.

    Args:
        pid: Of a process started from here.

    Raises:
        SandboxError: This machine lets nobody read it.
    """
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return -1
    except OSError as error:
        raise SandboxError(
            "Memory of a sandboxed process cannot be read, so that its paths cannot be looked at.",
            actual=str(error),
            hint="install bubblewrap, or set kernel.yama.ptrace_scope to 1 or 0",
        ) from error


def _follows(name: str, arguments: list[int]) -> bool:
    """Whether a call looks at what a link leads to, not at the link."""
    if name in OPENING:
        return not arguments[OPENING[name]] & os.O_NOFOLLOW
    if name in _NOT_FOLLOWED:
        return not arguments[_NOT_FOLLOWED[name]] & _AT_SYMLINK_NOFOLLOW
    return name in _FOLLOWING


def _control(fd: int, request: int, content: bytearray) -> None:
    while True:
        try:
            fcntl.ioctl(fd, request, content, True)
        except InterruptedError:
            continue
        return
