"""The digest of the code that reads, renders and tokenises records."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def code_digest() -> str:
    """The SHA-256 of the Python files of `mftctl.data`, so that prepared data is made anew after a change to them."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py")):
        content = (package / name).read_bytes()
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()
