"""The files that a bare Python needs to read, and nothing else on this machine."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Tests of HumanEval+ and MBPP+ import numpy; other packages may contain the answers to a benchmark.
PACKAGE = "numpy"
_PYTHONS = ("python*", "pypy*", "site-packages", "dist-packages")
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_LOADER_FILES = ("/etc/ld.so.cache",)


@dataclass(frozen=True, slots=True)
class Installation:
    """The running interpreter without its packages.

    Attributes:
        executable: The interpreter itself, not a virtual environment's link to it.
        library: Folder of the standard library.
        hidden: Folders within the library that contain installed packages.
        hidden_beside: Folders of other packages and Python installations among the system libraries.
        shared_objects: Shared libraries next to the interpreter that it is linked against.
        packages: Name and folder of each package that untrusted code may import.
        package_libraries: Folders of shared libraries that those packages load.
    """

    executable: Path
    library: Path
    hidden: tuple[Path, ...]
    hidden_beside: tuple[Path, ...]
    shared_objects: tuple[Path, ...]
    packages: dict[str, Path]
    package_libraries: tuple[Path, ...]

    @property
    def system_files(self) -> tuple[Path, ...]:
        """Existing folders and files of the system's shared libraries."""
        return tuple(path for path in map(Path, (*SYSTEM_LIBRARIES, *_LOADER_FILES)) if path.exists())


@cache
def find_installation() -> Installation:
    """The installation of the running interpreter."""
    executable = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    beside = Path(sys.base_prefix).resolve() / "lib"
    spec = find_spec(PACKAGE)
    packages = {} if spec is None or spec.origin is None else {PACKAGE: Path(spec.origin).resolve().parent}
    libraries = [folder.with_name(f"{folder.name}.libs") for folder in packages.values()]
    return Installation(
        executable=executable,
        library=library,
        hidden=tuple(folder for name in ("site-packages", "dist-packages") if (folder := library / name).is_dir()),
        hidden_beside=tuple(_other_pythons(library)),
        shared_objects=tuple(sorted(path for path in beside.glob("*.so*") if path.is_file())),
        packages=packages,
        package_libraries=tuple(folder for folder in libraries if folder.is_dir()),
    )


def _other_pythons(library: Path) -> Iterator[Path]:
    """Folders of other packages, such as Debian's /usr/lib/python3/dist-packages."""
    around = (library, *library.parents)
    for folder in sorted({Path(name).resolve() for name in SYSTEM_LIBRARIES if Path(name).is_dir()}):
        found = {path for pattern in _PYTHONS for path in folder.glob(pattern) if path.is_dir()}
        yield from sorted(path for path in found if path not in around and not path.is_symlink())
