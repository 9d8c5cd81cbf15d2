"""Restricts files, ports and signals with Landlock: everything without a rule is inaccessible."""

from __future__ import annotations

import ctypes
import os
import stat
import struct

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG = 1 << 7, 1 << 8
TRUNCATE = 1 << 14
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15
_WORKING_FOLDER = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG
_TCP_RIGHTS = 0b11
_SCOPES = 0b11  # abstract UNIX sockets, signals


def abi() -> int:
    """The kernel's Landlock version, starting at 1.

    Raises:
        OSError: The kernel does not support Landlock, or it is disabled.
    """
    return _call(_CREATE_RULESET, None, 0, _VERSION_FLAG)


def restrict(readable: Sequence[str], listable: Sequence[str], working_folder: str) -> None:
    """Permanently restricts this process to the given paths.

    Args:
        readable: Files and folders that may be read, with all their contents.
        listable: Folders that may be listed, with all their subfolders.
        working_folder: The folder in which files may be created, written and removed.

    Raises:
        OSError: The kernel refused, so no code may run.
    """
    version = abi()
    handled_files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = [handled_files]
    if version >= 4:
        attributes.append(_TCP_RIGHTS)
    if version >= 6:
        attributes.append(_SCOPES)
    packed = struct.pack(f"<{len(attributes)}Q", *attributes)
    ruleset = _call(_CREATE_RULESET, ctypes.c_char_p(packed), len(packed), 0)
    for path in readable:
        _allow(ruleset, path, (READ_FILE | READ_DIR) & handled_files)
    for path in listable:
        _allow(ruleset, path, READ_DIR & handled_files)
    _allow(ruleset, working_folder, _WORKING_FOLDER & handled_files)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    _call(_RESTRICT_SELF, ctypes.c_int(ruleset), 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _FILE_RIGHTS
    rule = struct.pack("<Qi", rights, fd)
    _call(_ADD_RULE, ctypes.c_int(ruleset), _PATH_BENEATH, ctypes.c_char_p(rule), 0)
    os.close(fd)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
