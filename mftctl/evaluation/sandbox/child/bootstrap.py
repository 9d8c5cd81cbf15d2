"""Entry point of a sandboxed process: confines itself, then runs the candidate or the judge.

Run by path with `python -I -S`. mftctl sends the order on standard input. Only the modules next to this file are
loaded, under their full names but without the packages above them, which would import all of mftctl.
"""

from __future__ import annotations

import marshal
import os
import sys
import types

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

PACKAGE = "mftctl.evaluation.sandbox.child"


class OnePackage:
    """Finds a single permitted package, without the rest of the folder it is installed in."""

    def __init__(self, name: str, folder: str) -> None:
        self._name = name
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """The package's spec; None for every other name."""
        if name != self._name:
            return None
        from importlib.util import spec_from_file_location

        start = f"{self._folder}/__init__.py"
        return spec_from_file_location(name, start, submodule_search_locations=[self._folder])


def _stand_in_for_packages() -> None:
    parts = PACKAGE.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        package = types.ModuleType(name)
        package.__path__ = [os.path.dirname(os.path.abspath(__file__))] if name == PACKAGE else []  # noqa: PTH100, PTH120 - pathlib takes 10 ms to load
        sys.modules[name] = package


def main() -> None:
    """Carries out the order on standard input; does not return."""
    order = marshal.loads(sys.stdin.buffer.read())
    _stand_in_for_packages()
    from mftctl.evaluation.sandbox.child import candidate, confinement, gate, judge, landlock, seccomp

    folder, fds = order["folder"], order["fds"]
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    confinement.clear_environment(folder)
    confinement.close_all_but([*fds, order["gate"]])
    confinement.limit_resources(order["limits"])
    for name, path in order["packages"].items():
        sys.meta_path.append(OnePackage(name, path))
    if order["parent"] is not None:
        confinement.end_with(order["parent"])
    if order["confined"]:
        confinement.drop_capabilities()
        if order["landlock"] is not None:
            landlock.restrict(order["landlock"]["readable"], order["landlock"]["listable"], folder)
        gate.install(order["gate"], asks_for_paths=order["asks_for_paths"])
        seccomp.install()
    else:
        os.close(order["gate"])
    for name in [name for name in sys.modules if name.startswith(PACKAGE.partition(".")[0])]:
        del sys.modules[name]
    if order["role"] == "candidate":
        candidate.serve(order["source"], *fds)
    else:
        judge.serve(order["source"], order["entry_point"], *fds)


if __name__ == "__main__":
    main()
