"""The files that accompany a checkpoint's weights: configuration, tokenizer, chat templates, licence."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mftctl.errors import ModelError
from mftctl.files.ownership import MARKER
from mftctl.masking.checkpoints.tensors import INDEX_FILE
from mftctl.progress import Listener

CARD_FILE: Final = "README.md"
_TEMPLATE_FOLDER: Final = "additional_chat_templates"
_WEIGHT_SUFFIXES: Final = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .pkl .npz .tflite .bits".split()
)
_WEIGHT_INDEX_SUFFIX: Final = ".index.json"
_NOT_COPIED: Final = (CARD_FILE, MARKER)
"""Files that are specific to one checkpoint and are not copied."""


def copy_companions(source: Path, folder: Path, *, sharded: bool) -> tuple[str, ...]:
    """Copies the files that accompany the weights; returns the names of links to outside files, which are skipped.

    Args:
        source: A checkpoint, with no links in its path. In the hub's cache, its files are links to blobs.
        folder: The new checkpoint.
        sharded: Whether the new checkpoint has an index of shards.

    Raises:
        ModelError: The configuration itself is such a link.
    """
    allowed = (source, *_hub_blobs(source))
    left_out = []
    for path in _companions(source, sharded=sharded):
        name = path.relative_to(source).as_posix()
        if any(path.resolve().is_relative_to(root) for root in allowed):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        else:
            left_out.append(name)
    if "config.json" in left_out:
        raise ModelError(
            "The model's configuration is a link to a file outside its folder; such links are not followed.",
            path=source / "config.json",
            expected="a file in the folder",
            actual=(source / "config.json").resolve(),
            hint="replace the link with a copy of the file",
        )
    return tuple(left_out)


def tell_left_out(left_out: Sequence[str], listener: Listener) -> None:
    """Warns of files that were not copied.

    Args:
        left_out: From `copy_companions`.
        listener: Receives the warning.
    """
    if left_out:
        listener.warn(
            f"Not copied, because they link to files outside the model's folder: {', '.join(left_out)}. "
            "Copy them yourself if the model needs them."
        )


def _companions(source: Path, *, sharded: bool) -> list[Path]:
    found = [
        path
        for path in source.iterdir()
        if path.is_file() and not _is_of_weights(path, sharded=sharded) and path.name not in _NOT_COPIED
    ]
    return sorted([*found, *(path for path in source.glob(f"{_TEMPLATE_FOLDER}/*") if path.is_file())])


def _hub_blobs(source: Path) -> list[Path]:
    """The folder with a hub snapshot's files: `models--A--B/blobs` for `models--A--B/snapshots/C`."""
    blobs = source.parent.parent / "blobs"
    return [blobs] if source.parent.name == "snapshots" and blobs.is_dir() else []


def _is_of_weights(path: Path, *, sharded: bool) -> bool:
    """True if a file holds weights, or is an index of shards that the new folder does not have."""
    if path.name == INDEX_FILE:
        return not sharded
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(_WEIGHT_INDEX_SUFFIX)
