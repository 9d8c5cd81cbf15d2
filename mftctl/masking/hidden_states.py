"""Hidden states by batch: in memory up to a limit, then in a memory-mapped file up to another."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class _Stored:
    layer: int
    shape: torch.Size
    dtype: torch.dtype
    size_bytes: int
    offset_bytes: int | None
    """Where in the file; None for memory."""


class HiddenStates:
    """The hidden states that enter some decoder layer, for as many batches as there is room for.

    The file has no name: it is gone with the process, however that ends.

    Args:
        folder: Gets the file.
        memory_bytes: Most bytes in memory.
        file_bytes: Most bytes in the file.

    Attributes:
        reused: How often hidden states were found.
    """

    def __init__(self, folder: Path, memory_bytes: int, file_bytes: int) -> None:
        self._folder = folder
        self._room_bytes = memory_bytes
        self._file_room_bytes = file_bytes
        self._file: IO[bytes] | None = None
        self._file_size_bytes = 0
        self._stored: dict[bytes, _Stored] = {}
        self._tensors: dict[bytes, torch.Tensor] = {}
        self.reused = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stored.clear()
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def size_bytes(self) -> int:
        """Bytes kept, in memory and in the file."""
        return sum(stored.size_bytes for stored in self._stored.values())

    def get(self, batch: bytes, deepest: int) -> tuple[int, torch.Tensor] | None:
        """The layer that a batch's hidden states enter, and they, on the CPU; None where there are none of use.

        Args:
            batch: What `put` was given.
            deepest: The layer at which they are of no more use if they are beyond it.
        """
        stored = self._stored.get(batch)
        if stored is None or stored.layer > deepest:
            return None
        self.reused += 1
        return stored.layer, self._tensors[batch] if stored.offset_bytes is None else self._read(stored)

    def put(self, batch: bytes, layer: int, hidden_states: torch.Tensor) -> bool:
        """Keeps a batch's hidden states in the place of those it had; False where there is no room.

        Args:
            batch: Names the batch.
            layer: Index of the decoder layer that they enter.
            hidden_states: `(records, tokens, hidden)` on any device, not to be changed afterwards.

        Raises:
            OSError: The file cannot be written.
        """
        hidden_states = hidden_states.detach().cpu()
        size_bytes, before = hidden_states.nbytes, self._stored.get(batch)
        if before is not None and before.size_bytes != size_bytes:
            return False
        offset_bytes = None if before is None else before.offset_bytes
        if before is None and size_bytes > self._room_bytes:
            if size_bytes > self._file_room_bytes:
                return False
            offset_bytes = self._file_size_bytes
        if offset_bytes is None:
            self._tensors[batch] = hidden_states
        else:
            self._write(hidden_states, offset_bytes)
        if before is None and offset_bytes is None:
            self._room_bytes -= size_bytes
        elif before is None:
            self._file_room_bytes -= size_bytes
            self._file_size_bytes += size_bytes
        self._stored[batch] = _Stored(layer, hidden_states.shape, hidden_states.dtype, size_bytes, offset_bytes)
        return True

    def _read(self, stored: _Stored) -> torch.Tensor:
        mapped = np.memmap(
            self._opened(), dtype=np.uint8, mode="r", offset=stored.offset_bytes or 0, shape=(stored.size_bytes,)
        )
        return torch.from_numpy(np.array(mapped)).view(stored.dtype).view(stored.shape)

    def _write(self, hidden_states: torch.Tensor, offset_bytes: int) -> None:
        # Not through the map: on a full disk that is a signal that ends the process, and here an error.
        file = self._opened()
        file.seek(offset_bytes)
        file.write(hidden_states.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self._file
