"""What is judged, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from mftctl.errors import SandboxError

Outcome = Literal["passed", "failed", "timed out", "out of memory", "too much output", "crashed"]


@dataclass(frozen=True, slots=True)
class Program:
    """One piece of model-written code and its test.

    Attributes:
        code: The model's code, which defines functions.
        test: Source of the test, which fails by raising. Names that it neither defines nor finds among Python's
            builtins are the code's.
        entry_point: The function under test; needed only where it is called like a builtin, which is the test's own
            otherwise (MBPP 126 asks for `sum`).
    """

    code: str
    test: str
    entry_point: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program passes its test.

    Attributes:
        passed: Whether the test ran to its end, with all that it asked of the program right.
        outcome: What happened.
        detail: Type and text of what went wrong, at most a few hundred printable characters; empty if it passed.
        seconds: Wall time from the start of its processes to the verdict.
    """

    passed: bool
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What each of a program's two processes may use; the wall time holds for both together.

    There is no limit on processes and threads: a confined process may start none.

    Attributes:
        cpu_seconds: Processor time.
        wall_seconds: Time from start to verdict, kept from outside.
        memory_bytes: Address space, of which numpy alone takes about 200 MiB.
        file_bytes: Largest file.
        files: How often it may make a file or a folder, and so how many there can be, with and without a name.
        output_bytes: Standard output and standard error together.
        open_files: File descriptors.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**18
    files: int = 64
    output_bytes: int = 2**20
    open_files: int = 32

    @property
    def folder_bytes(self) -> int:
        """The most that the files of a process hold in all."""
        return self.files * self.file_bytes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise SandboxError("A limit of the sandbox must be above 0.", key=field.name, actual=value)
