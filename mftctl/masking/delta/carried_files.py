"""The text files of a fine-tuned checkpoint that go with its weights: chat template, stop tokens, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mftctl.errors import ModelError
from mftctl.files.regular import read_regular
from mftctl.masking.checkpoints.companions import CARD_FILE
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.document import CARRIED_FILES, MAX_FILE_BYTES

_WITHOUT_EFFECT: Final[Mapping[str, frozenset[str]]] = {
    "config.json": frozenset(("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")),
    "generation_config.json": frozenset(("_from_model_config", "transformers_version")),
    "tokenizer.json": frozenset(("truncation", "padding")),
    "tokenizer_config.json": frozenset(("name_or_path", "is_local", "local_files_only")),
}
"""Keys that say how a file was saved, and not how the model works."""


def changed_files(base: Path, tuned: Path) -> dict[str, bytes]:
    """The files of a fine-tuned checkpoint that differ in content from the base's, by name.

    A file that only the base has is left to it.

    Args:
        base: The base's folder.
        tuned: The folder of the checkpoint tuned from it.

    Raises:
        ModelError: A file cannot be read, or is too large.
    """
    found = {}
    for name in CARRIED_FILES:
        if not (tuned / name).is_file():
            continue
        content = _read(tuned / name)
        if not (base / name).is_file() or _meaning(name, _read(base / name)) != _meaning(name, content):
            found[name] = content
    return found


@contextmanager
def beside(base: Path, delta: Delta) -> Iterator[Path]:
    """A folder with the base's weights and the files that go with the changed model.

    Args:
        base: The base's folder.
        delta: A delta for it.

    Yields:
        The base itself if the delta holds no files, otherwise a temporary folder of links and these files.
    """
    if not delta.contents.files:
        yield base
        return
    base = base.resolve()
    with TemporaryDirectory(prefix="mftctl-delta-") as name:
        folder = Path(name)
        for path in base.iterdir():
            if path.name not in delta.contents.files and path.name != CARD_FILE:
                (folder / path.name).symlink_to(path)
        for file in delta.contents.files:
            (folder / file).write_bytes(delta.file(file))
        yield folder


def _read(path: Path) -> bytes:
    try:
        content = read_regular(path)
    except OSError as error:
        raise ModelError("A file of the checkpoint cannot be read.", path=path, actual=error) from error
    if len(content) > MAX_FILE_BYTES:
        raise ModelError(
            "A file of the checkpoint is too large for a delta file.",
            path=path,
            expected=f"at most {MAX_FILE_BYTES:,} bytes",
            actual=f"{len(content):,}",
        )
    return content


def _meaning(name: str, content: bytes) -> object:
    """What a file says, without the keys that have no effect; its bytes if it is not a JSON object."""
    if not name.endswith(".json"):
        return content
    try:
        document: Any = json.loads(content)
    except ValueError:
        return content
    if not isinstance(document, dict):
        return document
    passed_over = _WITHOUT_EFFECT.get(name, frozenset())
    return {key: value for key, value in document.items() if key not in passed_over}
