"""How much a sandboxed process may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mftctl.errors import SandboxError


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
