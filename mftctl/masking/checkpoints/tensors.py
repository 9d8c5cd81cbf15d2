"""Index of a checkpoint's tensors: names, dtypes, shapes and positions in one or several safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from mftctl.errors import ModelError
from mftctl.files.regular import is_file

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
CHUNK_BYTES: Final = 2**18
"""Small enough to stay in a core's cache through reading, hashing, masking and writing."""

_DOWNLOAD_HINT: Final = "download or save the checkpoint again (a git-lfs pointer is not the file itself)"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint on disk.

    Attributes:
        name: Its name in the checkpoint.
        path: The safetensors file that holds it.
        dtype: Its safetensors dtype name, such as "BF16".
        shape: Its shape.
        offset_bytes: Offset of its bytes from the start of the file.
        length_bytes: Length in bytes.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    length_bytes: int


def tensor_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name.

    Args:
        folder: A folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards. As in
            transformers, the single file takes precedence over an index.

    Raises:
        ModelError: There are no safetensors weights, a shard is missing or damaged, a tensor is not where the index
            places it, or two shards hold the same tensor.
    """
    if (folder / WEIGHTS_FILE).is_file():
        only = {stored.name: stored for stored in _read_layout(folder / WEIGHTS_FILE)}
        if not only:
            raise ModelError("The checkpoint holds no tensors.", path=folder / WEIGHTS_FILE, hint=_DOWNLOAD_HINT)
        return only
    files = _read_weight_map(folder)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(files.values())):
        for stored in _read_layout(folder / file_name):
            if stored.name in tensors:
                raise ModelError(
                    "Two shards of the checkpoint hold the same tensor.",
                    path=folder,
                    key=stored.name,
                    actual=f"{tensors[stored.name].path.name} and {file_name}",
                    hint=_DOWNLOAD_HINT,
                )
            tensors[stored.name] = stored
    for name, file_name in files.items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise ModelError(
                "The checkpoint does not hold this tensor where its index places it.",
                path=folder / INDEX_FILE,
                key=name,
                expected=f"in {file_name}",
                actual=f"in {tensors[name].path.name}" if name in tensors else "in no shard",
                hint=_DOWNLOAD_HINT,
            )
    return tensors


def tensor_digest(stored: StoredTensor) -> str:
    """The hex SHA-256 of the tensor's stored bytes, read in chunks."""
    digest = hashlib.sha256()
    with stored.path.open("rb") as stream:
        stream.seek(stored.offset_bytes)
        for chunk in read_chunks(stream, stored.length_bytes, stored.path):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Loads the tensor with its stored shape and dtype."""
    with safe_open(stored.path, framework="pt") as reader:
        tensor: torch.Tensor = reader.get_tensor(stored.name)
    return tensor


def read_chunks(stream: BufferedReader, length_bytes: int, path: Path) -> Iterator[memoryview]:
    """Yields the next `length_bytes` bytes in chunks of at most `CHUNK_BYTES`, each writable, valid until the next.

    Raises:
        ModelError: The file ends early.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, length_bytes)))
    for start in range(0, length_bytes, CHUNK_BYTES):
        chunk = buffer[: length_bytes - start]
        if stream.readinto(chunk) != len(chunk):
            raise truncated(path)
        yield chunk


def truncated(path: Path) -> ModelError:
    """The error for a file that ends too early."""
    return ModelError("The checkpoint was truncated while it was read.", path=path, hint=_DOWNLOAD_HINT)


def _read_layout(path: Path) -> list[StoredTensor]:
    """The tensors of one file; the safetensors library checks that its header is sound."""
    if not is_file(path):
        raise ModelError("A weight file of the checkpoint is missing.", path=path, hint=_DOWNLOAD_HINT)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "A weight file of the checkpoint is not a complete safetensors file.",
            path=path,
            actual=str(error),
            hint=_DOWNLOAD_HINT,
        ) from error
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return [_stored(path, name, entry, 8 + header_bytes) for name, entry in header.items()]


def _stored(path: Path, name: str, entry: dict[str, Any], start_bytes: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), start_bytes + first, last - first)


def _read_weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ModelError(
            "The folder holds no safetensors weights.",
            path=folder,
            expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
            hint="give a folder written by save_pretrained",
        )
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        names = [*files, *files.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError("The index of the shards cannot be read.", path=path, hint=_DOWNLOAD_HINT) from error
    if not files or not all(isinstance(name, str) for name in names):
        raise ModelError("The index of the shards names no files.", path=path, key="weight_map", hint=_DOWNLOAD_HINT)
    outside = [name for name in files.values() if Path(name).name != name]
    if outside:
        raise ModelError(
            "The index names a shard outside the checkpoint's folder.",
            path=path,
            expected="plain file names",
            actual=outside[0],
            hint="use a checkpoint from a source you trust",
        )
    return dict(files)
