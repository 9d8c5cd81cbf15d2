"""Programs to judge and their verdicts."""

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
        test: Source of the test, which fails by raising. Names that are neither defined in it nor Python builtins
            refer to the code.
        entry_point: The function under test; needed only if it has the name of a builtin, which otherwise takes
            precedence (MBPP 126 asks for `sum`).
    """

    code: str
    test: str
    entry_point: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of judging a program.

    Attributes:
        passed: Whether the test ran to its end and every check succeeded.
        outcome: The outcome.
        detail: Type and text of the failure, at most a few hundred printable characters; empty if it passed.
        seconds: Wall time from the start of its processes to the verdict.
    """

    passed: bool
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of each of a program's two processes; the wall time applies to both together.

    There is no limit on processes and threads: a confined process may not start any.

    Attributes:
        cpu_seconds: CPU time.
        wall_seconds: Time from start to verdict, enforced from outside.
        memory_bytes: Address space; numpy alone takes about 200 MiB.
        file_bytes: Size of the largest file.
        files: Number of files and folders that may be created, named or unnamed.
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
        """Maximum total size of a process's files."""
        return self.files * self.file_bytes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise SandboxError("A limit of the sandbox must be above 0.", key=field.name, actual=value)
