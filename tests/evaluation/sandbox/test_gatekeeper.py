"""Which system calls the kernel passes to the gatekeeper, and which paths a process may name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.evaluation.sandbox.child import gate
from mftctl.evaluation.sandbox.child.syscall_numbers import ARCHITECTURES, NUMBERS, number_of
from mftctl.evaluation.sandbox.kinds import Sandbox
from mftctl.evaluation.sandbox.python_files import find_installation
from mftctl.evaluation.sandbox.visible_paths import VisiblePaths

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
_WITHOUT_PATH = {"fstat", "fchdir", "ftruncate", "restart_syscall"}


def decision(lines: list[gate.Instruction], machine: str, number: int, arguments: tuple[int, ...]) -> int:
    """The kernel's decision under a filter."""
    words = {0: number, 4: ARCHITECTURES[machine]} | {16 + 8 * n: value for n, value in enumerate(arguments)}
    at = loaded = 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        match code:
            case 0x20:
                loaded = words[value]
            case 0x54:
                loaded &= value
            case 0x15:
                at += yes if loaded == value else no
            case 0x06:
                return value


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_call_with_a_path_is_checked_if_paths_are_checked(machine: str) -> None:
    lines = gate.assemble(machine, asks_for_paths=True)
    for name in NUMBERS:
        number = number_of(name, machine)
        if number is not None:
            takes = re.search(r"stat|open|link|dir|access|rename|trunc", name) and name not in _WITHOUT_PATH
            assert decision(lines, machine, number, (0,) * 6) == (NOTIFY if takes else ALLOW), name


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "flags", "asked"),
    [
        ("openat", os.O_RDONLY, False),
        ("openat", os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC | os.O_DIRECTORY, False),
        ("openat", os.O_CREAT, True),
        ("openat", os.O_CREAT | os.O_EXCL | os.O_WRONLY, True),
        ("openat", os.O_TMPFILE | os.O_RDWR, True),
        ("mkdirat", 0, True),
        ("unlinkat", 0, False),
    ],
)
def test_only_creating_calls_are_checked_if_paths_are_not(machine: str, name: str, flags: int, asked: bool) -> None:
    lines = gate.assemble(machine, asks_for_paths=False)
    number = number_of(name, machine)
    assert number is not None
    assert decision(lines, machine, number, (0, 0, flags, 0, 0, 0)) == (NOTIFY if asked else ALLOW)


@pytest.fixture
def around(tmp_path: Path) -> Path:
    """A library with a hidden folder and links, a working folder, and files outside them."""
    for folder in ("library/open", "library/hidden", "outside/deep/deeper", "work/sub"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "outside" / "secret").touch()
    (tmp_path / "library/open/link").symlink_to(tmp_path / "outside/deep/deeper")
    (tmp_path / "library/open/inner").symlink_to(tmp_path / "library/open")
    return tmp_path


def view(around: Path) -> VisiblePaths:
    return VisiblePaths([f"{around}/library/open"], [f"{around}/library"], f"{around}/work")


@pytest.mark.parametrize(
    ("path", "follows", "seen"),
    [
        ("library", True, True),
        ("library/", True, True),
        ("library/hidden", True, False),
        ("library/open/module.py", True, True),
        ("library/open/none/module.py", True, True),
        ("library/openly", True, False),
        ("library/open/inner/module.py", True, True),
        ("library/open/link", False, True),
        ("library/open/link", True, False),
        ("library/open/link/", False, False),
        ("library/open/link/x", False, False),
        ("library/open/link/../../secret", True, False),
        ("library/open/../../outside/secret", True, False),
        ("library/open/../hidden", True, False),
        ("library/hidden/../open/module.py", True, True),
        ("work", True, True),
        ("work/sub/new", True, True),
        ("work/sub/../new", True, True),
        ("work/..", True, False),
        ("work/../outside/secret", False, False),
        ("works", True, False),
        ("outside", True, False),
        ("", True, False),
        (".", True, False),
        ("..", True, False),
    ],
)
def test_allowed_paths(around: Path, path: str, follows: bool, seen: bool) -> None:
    assert view(around).shows(f"{around}/{path}", follows=follows) is seen


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.lists(st.sampled_from(["..", ".", "", "library", "open", "hidden", "link", "inner", "work", "sub", "outside"])),
    st.booleans(),
)
def test_visible_paths_lie_in_allowed_folders(around: Path, parts: list[str], follows: bool) -> None:
    """Checked independently through the kernel's own path resolution."""
    path = "/".join([str(around), *parts])
    if not view(around).shows(path, follows=follows):
        return
    real = os.path.realpath(path)
    link = not follows and Path(path.rstrip("/.") or "/").is_symlink() and parts[-1] not in ("", ".")
    if not link:
        allowed = (f"{around}/library/open", f"{around}/work")
        assert real == f"{around}/library" or any(f"{real}/".startswith(f"{folder}/") for folder in allowed)


def test_no_other_package_is_readable() -> None:
    """Neither next to the running Python nor among the system's libraries, unless granted by name."""
    installation = find_installation()
    for text in Sandbox("landlock", installation).order(Path("/none"))["landlock"]["readable"]:
        if Path(text) not in (*installation.packages.values(), *installation.package_libraries):
            assert not re.search(r"/(site|dist)-packages(/|$)", text)
            assert not any(Path(text) in folder.parents or Path(text) == folder for folder in installation.hidden)
            assert not any(Path(text) in folder.parents for folder in installation.hidden_beside)
