from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mftctl.runtime.torch_failures import failure_of_writing, reason_of


class FullDisk(io.RawIOBase):
    """A file that accepts only the first few bytes."""

    def __init__(self, room_bytes: int) -> None:
        self._left_bytes = room_bytes

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


@pytest.mark.parametrize("room_bytes", [0, 100, 700, 5_000, 40_000])
def test_the_system_error_behind_torchs_own_is_found(room_bytes: int) -> None:
    with pytest.raises((RuntimeError, OSError)) as caught:
        torch.save({"weight": torch.zeros(10_000)}, FullDisk(room_bytes))
    found = failure_of_writing(caught.value)
    assert found is not None
    assert found.errno == errno.ENOSPC
    assert reason_of(caught.value) == "No space left on device"


@pytest.mark.slow
def test_without_a_system_error_no_torch_source_is_shown(tmp_path: Path) -> None:
    code = f"""if True:
        import resource, torch
        from mftctl.runtime.torch_failures import reason_of
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            torch.save(torch.zeros(10_000), {str(tmp_path / "x.pt")!r})
        except RuntimeError as error:
            print(reason_of(error))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "disk full, file size limit or broken disk: torch could not finish writing a file\n"


def test_other_errors_are_reported_unchanged() -> None:
    assert reason_of(RuntimeError("CUDA error")) == "CUDA error"
    assert failure_of_writing(RuntimeError("CUDA error")) is None
