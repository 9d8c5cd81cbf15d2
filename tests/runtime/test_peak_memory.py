"""Freed memory is kept unless the user set otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

CODE = """
from pathlib import Path
import numpy as np
from mftctl.runtime.peak_memory import keep_freed_memory
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20
kept = keep_freed_memory()
before = resident_mb()
block = np.ones(64 << 20, dtype=np.uint8)
held = resident_mb() - before
del block
print(kept, held >= 60, resident_mb() - before >= 60)
"""


def told(**environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=inherited | environment, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_a_freed_block_stays_with_the_process() -> None:
    assert told() == ["True", "True", "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}],
    ids=lambda chosen: next(iter(chosen)),
)
def test_settings_of_the_user_are_kept(chosen: dict[str, str]) -> None:
    assert told(**chosen) == ["False", "True", "False"]
