"""Digests of experiment inputs and of mftctl's code, to detect changes."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from mftctl.files.regular import open_regular

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 20


def digest_of(document: Any) -> str:
    """Returns the SHA-256 of plain data in hex."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_digest(path: str) -> str | None:
    """Returns the SHA-256 of a file or of all files in a folder; None for built-in data and hub ids."""
    file = Path(path)
    if file.is_dir():
        inside = sorted(entry for entry in file.rglob("*") if entry.is_file())
        return digest_of([[str(entry.relative_to(file)), file_digest(str(entry))] for entry in inside])
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_fingerprint(model: str) -> str | None:
    """Returns a digest of a local checkpoint; None for the built-in model and hub ids, identified by their names.

    It covers the size and 16 evenly spaced samples of 1 MiB of each weight file: training changes whole tensors, and
    reading all of a large model would take minutes each time an experiment is planned.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*config.json", "*.jinja", "tokenizer.*")
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}:{size_bytes}:".encode())
        with open_regular(path) as stream:
            for number in range(_SAMPLES):
                stream.seek(max(0, size_bytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@cache
def source_digest() -> str:
    """Returns the first 12 hex digits of the SHA-256 of mftctl's own Python files, names and contents.

    The version identifies a release; this distinguishes a checkout with changes from one without.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py")):
        content = (package / name).read_bytes()
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()[:12]
