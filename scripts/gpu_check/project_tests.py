"""Runs the project's device-related tests on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.gpu_check.findings import Check, Finding, Measurement
from scripts.gpu_check.scale import Scale

ROOT = Path(__file__).parents[2]


def project_tests(scale: Scale) -> Iterator[Finding]:
    """Runs pytest with one process per core."""
    workers = "0" if scale.rehearses else str(min(os.cpu_count() or 1, 14))
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", "-m", "", *scale.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    for word, number in counts.items():
        yield Measurement(f"tests {word}", number)
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    tail = (done.stdout + done.stderr)[-800:] if not failures else "\n".join(failures)
    yield Check("the tests pass", done.returncode == 0, "" if done.returncode == 0 else tail)
