"""A hostile program that checks whether a sandbox works: it lists the escape attempts that succeed."""

from __future__ import annotations

# The system's own calls are what is tried.
# ruff: noqa: PTH101, PTH123, PTH208
import ctypes
import errno
import os
import socket
from collections.abc import Callable, Sequence

_PTRACE_PEEKDATA = 2
_ALLOWED_VARIABLES = {"HOME", "TMPDIR", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}


def harmless(count: int) -> int:
    """The sum of the numbers up to `count`, computed by way of a file in the working folder."""
    with open("numbers", "w", encoding="ascii") as stream:
        stream.write("\n".join(map(str, range(count + 1))))
    with open("numbers", encoding="ascii") as stream:
        return sum(map(int, stream))


def what_is_open(secret: str, target: str, folder: str, runner: int, variables: Sequence[str]) -> list[str]:
    """Names of the escape attempts that succeed.

    Args:
        secret: A file outside that must not be readable.
        target: A file outside that must not be writable.
        folder: A folder outside that must not be listed or written to.
        runner: A process outside that must not be reachable.
        variables: Names of environment variables that must not be set.
    """
    attempts: dict[str, Callable[[], object]] = {
        "reading outside": lambda: open(secret, "rb").read(),
        "writing outside": lambda: open(target, "ab").write(b"!"),
        "adding outside": lambda: open(f"{folder}/new", "wb"),
        "listing outside": lambda: os.listdir(folder),
        "changing a mode outside": lambda: os.chmod(target, 0o777),
        "linking outside": lambda: os.link(target, "link"),
        "other processes in /proc": lambda: open(f"/proc/{runner}/environ", "rb").read(),
        "a signal to the runner": lambda: os.kill(runner, 0),
        "a new process": _fork,
        "running a program": _execute,
        "changing limits": _raise_limit,
        "tracing": lambda: _traced(runner),
    }
    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"):
        attempts[f"a socket of {family}"] = lambda name=family: socket.socket(getattr(socket, name))  # type: ignore[misc]
    left = set(os.environ) & set(variables) - _ALLOWED_VARIABLES
    return [name for name, attempt in attempts.items() if _works(attempt)] + sorted(left)


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _execute() -> None:
    """Tries to run a program that does not exist: a filter refuses before the kernel looks for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.execve(b"/nowhere", None, None)
    if ctypes.get_errno() == errno.EPERM:
        raise OSError(errno.EPERM, "refused")


def _raise_limit() -> None:
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
    except ValueError as error:  # Python's translation of a refusal
        raise OSError from error


def _traced(runner: int) -> None:
    """Tries to read memory of a process that is not traced: attaching would stop the runner if nothing refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace(_PTRACE_PEEKDATA, runner, 0, 0)
    if ctypes.get_errno() == errno.EPERM:
        raise OSError(errno.EPERM, "refused")
