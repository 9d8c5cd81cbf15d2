"""The kinds of sandbox and the command that starts a process in each."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Imported so that their bytecode is cached; otherwise each child would have to compile them again.
from mftctl.evaluation.sandbox.child import candidate, confinement, gate, judge, landlock, seccomp  # noqa: F401
from mftctl.evaluation.sandbox.program import Limits
from mftctl.evaluation.sandbox.python_files import Installation

Kind = Literal["bubblewrap", "landlock", "none"]
BOOTSTRAP = Path(__file__).with_name("child").resolve() / "bootstrap.py"
_HIDING_BYTES = "4096"
_INNER_FOLDER = "/mftctl-sandbox"  # must not contain any bound path
# No site-packages, no environment variables, no user folder, no bytecode written.
_PYTHON_OPTIONS = ("-I", "-S", "-B", "-X", "utf8")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run untrusted code on this machine; `find_sandbox` returns one that works.

    Attributes:
        kind: `bubblewrap` and `landlock` confine code, each with a system call filter; `none` only limits resources.
        installation: The files that the code may read.
        bubblewrap: Path of the program `bwrap`, for that kind.
        passed_over: Why no better kind is used; empty if this is the best kind.
    """

    kind: Kind
    installation: Installation
    bubblewrap: str | None = None
    passed_over: str = ""

    @property
    def line(self) -> str:
        """The message about the sandbox for the user."""
        if self.kind == "bubblewrap":
            return "Model-written code runs under bubblewrap."
        if self.kind == "landlock":
            return (
                f"Model-written code runs under Landlock and seccomp because {self.passed_over}. It cannot see files "
                "or processes of this machine, only its host name, load and process ids. For stronger isolation, "
                "install bubblewrap (apt install bubblewrap, or dnf install bubblewrap)."
            )
        return "Model-written code runs with your own rights: it can read, change and send everything that you can."

    def command(self, limits: Limits) -> list[str]:
        """The command line of a process, which reads its order from standard input."""
        options = list(_PYTHON_OPTIONS)
        python = [str(self.installation.executable), *options, str(BOOTSTRAP)]
        if self.bubblewrap is None:
            return python
        return [self.bubblewrap, *self._bubblewrap_options(limits), "--", *python]

    def order(self, folder: Path) -> dict[str, Any]:
        """The part of a process's order that describes its sandbox.

        Args:
            folder: The working folder on this machine; bubblewrap replaces it with its own.
        """
        rules = None
        if self.kind == "landlock":
            rules = {"readable": self._readable(), "listable": [str(self.installation.library)]}
        return {
            "confined": self.kind != "none",
            "landlock": rules,
            # bubblewrap itself ends the processes it runs.
            "parent": None if self.kind == "bubblewrap" else os.getpid(),
            "folder": _INNER_FOLDER if self.kind == "bubblewrap" else str(folder),
            "packages": {name: str(path) for name, path in self.installation.packages.items()},
        }

    def _readable(self) -> list[str]:
        """All entries of the library and the system folders except the hidden ones.

        They are listed one by one because a Landlock rule has no exceptions.
        """
        installation = self.installation
        library = installation.library
        hidden = {*installation.hidden, *installation.hidden_beside, library, *library.parents}
        readable = [
            entry
            for path in (library, *installation.system_files)
            for entry in (path.resolve().iterdir() if path.is_dir() else [path])
            if entry not in hidden
        ]
        packages = (*installation.packages.values(), *installation.package_libraries)
        devices = (Path("/dev/null"), Path("/dev/urandom"))
        return [str(path) for path in (*readable, *packages, *devices) if path.exists()]

    def _bubblewrap_options(self, limits: Limits) -> list[str]:
        installation = self.installation
        options = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
        for path in installation.system_files:
            target = path.readlink() if path.is_symlink() else None
            options += ["--ro-bind", str(path), str(path)] if target is None else ["--symlink", str(target), str(path)]
        bound = (
            installation.executable,
            *installation.shared_objects,
            installation.library,
            *installation.packages.values(),
            *installation.package_libraries,
            BOOTSTRAP.parent,
        )
        for path in bound:
            # Paths within a hidden folder must be bound after the folder is hidden.
            options += ["--ro-bind", str(path), str(path)]
            if path == installation.library:
                for hidden in (*installation.hidden_beside, *installation.hidden):
                    options += ["--size", _HIDING_BYTES, "--tmpfs", str(hidden)]
        for device in ("/dev/null", "/dev/urandom"):
            options += ["--dev-bind", device, device]
        for hidden in (*installation.hidden_beside, *installation.hidden):
            options += ["--remount-ro", str(hidden)]
        options += ["--size", str(limits.folder_bytes), "--tmpfs", _INNER_FOLDER, "--remount-ro", "/"]
        return [*options, "--chdir", _INNER_FOLDER]


def candidates(installation: Installation) -> list[Sandbox]:
    """The sandboxes that may work on this machine, best first."""
    program = shutil.which("bwrap")
    found = [] if program is None else [Sandbox("bubblewrap", installation, program)]
    return [*found, Sandbox("landlock", installation, passed_over="bubblewrap is not installed")]
