"""Answers system calls that the kernel suspends until mftctl has checked them: file creation and path look-ups."""

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
"""Position of the flags argument that may forbid following links."""
_AT_SYMLINK_NOFOLLOW = 0x100
_FOLLOWING = ("openat", "open", "stat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "chdir")
_NAMES = {number_of(name, platform.machine()): name for name in PATHS}


def receive_listener(gate: socket.socket) -> int | None:
    """Receives the file descriptor on which a process's calls arrive; None if the process ended before sending it.

    Args:
        gate: This end of the process's socket.
    """
    _, fds, _, _ = socket.recv_fds(gate, 1, 1)
    return fds[0] if fds else None


@dataclass(slots=True)
class Gatekeeper:
    """Answers the calls of one process, which is single-threaded and so cannot change a path while it is checked.

    Attributes:
        listener: File descriptor on which the calls arrive.
        pid: Process id.
        memory: From `open_memory`; read only if paths are checked.
        most_made: Number of files and folders that the process may create.
        visible: The paths that the process may use; None if its own mount namespace already hides all others.
        made: Number of files and folders it has tried to create.
    """

    listener: int
    pid: int
    memory: int
    most_made: int
    visible: VisiblePaths | None
    made: int = 0

    @property
    def too_much_made(self) -> bool:
        """True if it created, or tried to create, more files and folders than allowed."""
        return self.made > self.most_made

    def answer(self) -> bool:
        """Answers all pending calls; False once no more can arrive."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        while found := poll.poll(0):
            if not found[0][1] & select.POLLIN:
                return False
            notice = bytearray(_NOTICE.size)
            try:
                _control(self.listener, _RECEIVE, notice)
            except FileNotFoundError:  # a signal interrupted the call or killed the process
                continue
            number, _, _, call, _, _, *arguments = _NOTICE.unpack(notice)
            code = self._refusal(_NAMES.get(call, ""), arguments)
            answer = _ANSWER.pack(number, 0, -code, 0 if code else _CONTINUE)
            with suppress(FileNotFoundError):
                _control(self.listener, _SEND, bytearray(answer))
        return True

    def _refusal(self, name: str, arguments: list[int]) -> int:
        """The error code for a call; 0 if it may continue."""
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
        if not path:  # the call refers to an open file
            return 0
        if not path.startswith(b"/"):
            fd = (start & 0xFFFFFFFF) - (1 << 32 if start & 1 << 31 else 0)
            where = "cwd" if fd == _CURRENT_FOLDER else f"fd/{fd}"
            try:
                path = bytes(Path(f"/proc/{self.pid}/{where}").readlink()) + b"/" + path
            except OSError:  # no such file, or the folder's path is too long
                return errno.ENOENT
        return 0 if visible.shows(os.fsdecode(path), follows=follows) else errno.ENOENT

    def _text_at(self, address: int) -> bytes | None:
        """The bytes at an address in the memory of the process; None if it is not mapped."""
        try:
            return os.pread(self.memory, _MOST_PATH_BYTES, address)
        except (OSError, OverflowError):
            return None


def open_memory(pid: int) -> int:
    """Opens the memory of a process for reading; returns -1 if it has ended.

    Args:
        pid: Id of a child process.

    Raises:
        SandboxError: This machine does not permit it.
    """
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return -1
    except OSError as error:
        raise SandboxError(
            "The memory of a sandboxed process cannot be read, so its file accesses cannot be checked.",
            actual=str(error),
            hint="install bubblewrap, or set kernel.yama.ptrace_scope to 1 or 0",
        ) from error


def _follows(name: str, arguments: list[int]) -> bool:
    """True if a call follows symbolic links."""
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
