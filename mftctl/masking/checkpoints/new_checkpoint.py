"""Writes a checkpoint computed from others: weights, the files that go with them, a model card, and its origin.

It appears under its name only when complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import ModelError
from mftctl.files.atomic import Permit, atomic_folder
from mftctl.files.ownership import Kind, permit_folder, write_marker
from mftctl.masking.checkpoints.companions import CARD_FILE, copy_companions
from mftctl.masking.checkpoints.tensors import WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class Written:
    """Summary of a checkpoint that was written.

    Attributes:
        bytes_written: The total size of the files in the new folder.
        left_out: Links in the source's folder to files outside it, which were not copied.
    """

    bytes_written: int
    left_out: tuple[str, ...] = ()


def permit_output(output: Path, inputs: Sequence[Path], *, replace: bool) -> Permit:
    """The permit to write a checkpoint to a folder, after checking that nothing there would be lost.

    Args:
        output: The new folder, with links resolved.
        inputs: Files and folders that are read, with links resolved.
        replace: Whether to replace a model that mftctl wrote.

    Raises:
        ModelError: The output contains an input, or is inside one.
        OutputError: The output holds something that may not be replaced.
    """
    permit = permit_folder(Kind.MODEL, replace=replace)
    _require_apart(output, inputs)
    if os.path.lexists(output):
        permit(output)
    return permit


def write_checkpoint(
    output: Path,
    permit: Permit,
    source: Path,
    write_weights: Callable[[Path], None],
    *,
    what: str,
    card: str,
    origin: Mapping[str, str] | None,
    beside: Mapping[str, bytes] | None = None,
) -> Written:
    """Writes a checkpoint, whole or not at all.

    Args:
        output: The new folder, with links resolved.
        permit: From `permit_output`.
        source: The checkpoint whose file layout, configuration and tokenizer the new one gets, with links resolved.
        write_weights: Writes the weight files into a folder, under the source's file names.
        what: A word for the new checkpoint, for the error message.
        card: The model card.
        origin: How it was produced; recorded in its folder.
        beside: Files by name that replace those of the source.

    Raises:
        ModelError: It cannot be written.
        OutputError: The output folder holds something that may not be replaced.
    """
    try:
        with atomic_folder(output, permit) as folder:
            write_weights(folder)
            left_out = copy_companions(source, folder, sharded=not (source / WEIGHTS_FILE).is_file())
            for name, content in (beside or {}).items():
                (folder / name).write_bytes(content)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            write_marker(folder, Kind.MODEL, origin)
            bytes_written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise ModelError(
            f"The {what} checkpoint could not be written; no partial output was left.",
            path=output,
            actual=str(error),
            hint="free some space or give another folder with -o",
        ) from error
    return Written(bytes_written, left_out)


def _require_apart(output: Path, inputs: Sequence[Path]) -> None:
    for path in inputs:
        if path.is_relative_to(output):
            raise ModelError(
                "The output folder contains an input, which would be lost.",
                path=output,
                actual=str(path),
                hint="give another folder with -o",
            )
        if output.is_relative_to(path):
            raise ModelError(
                "The output folder is inside an input's folder.",
                path=output,
                actual=str(path),
                hint="give a folder outside it with -o",
            )
