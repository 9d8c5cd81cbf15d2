"""Runs the checks that need a GPU; prints each finding as a line of JSON, and a table at the end.

python scripts/gpu_check --output $OUT            # 8 minutes on one GPU of 80 GB
python scripts/gpu_check --rehearse               # small, on an emulated GPU
python scripts/gpu_check --only masks,generation
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

REHEARSAL_PATIENCE = 4
"""A rehearsal may share two cores with other work, so its times are not meaningful."""

ROOT = Path(__file__).resolve().parents[2]
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read at import
sys.path.insert(0, str(ROOT))  # running a folder puts only that folder on the path, not the project or its tests

from scripts.gpu_check.findings import Check, Finding, Measurement, to_line
from scripts.gpu_check.isolated import End, Step, run_isolated
from scripts.gpu_check.scale import ON_A_GPU, REHEARSAL
from scripts.gpu_check.table import markdown


def all_steps() -> list[Step]:
    """The steps in the order in which they run: quick and informative steps first."""
    from scripts.gpu_check.generation import generation
    from scripts.gpu_check.kernels import kernels
    from scripts.gpu_check.masks import equal_masks
    from scripts.gpu_check.project_tests import project_tests
    from scripts.gpu_check.quickstart import quickstart_on_the_cpu, quickstart_on_the_gpu
    from scripts.gpu_check.speed import mask_beside_fine_tuning
    from scripts.gpu_check.training_steps import low_memory_tuning, mask_steps, tuning_steps
    from scripts.gpu_check.versions import versions

    return [
        Step("versions", versions, 30),
        Step("masks", equal_masks, 60),
        Step("quickstart-cpu", quickstart_on_the_cpu, 45, on_cpu=True),
        Step("quickstart", quickstart_on_the_gpu, 60),
        Step("kernels", kernels, 30),
        Step("mask-steps", mask_steps, 90),
        Step("fft-steps", tuning_steps, 75),
        Step("fft-low-memory", low_memory_tuning, 45),
        Step("generation", generation, 45),
        Step("speed", mask_beside_fine_tuning, 45),
        Step("tests", project_tests, 120),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and returns the number of failed steps and checks.

    Args:
        arguments: Command-line arguments.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="small, on an emulated GPU")
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT"), help="folder for the JSON lines and the table"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="comma-separated names of the steps to run")
    parser.add_argument("--seconds", type=float, default=480, help="time limit for all steps together")
    options = parser.parse_args(arguments)
    steps = [step for step in all_steps() if options.only is None or step.name in options.only]
    report = Report(options.output and Path(options.output))
    deadline_seconds = time.monotonic() + options.seconds
    scale = REHEARSAL if options.rehearse else ON_A_GPU
    for step in steps:
        left_seconds = deadline_seconds - time.monotonic()
        if left_seconds > 0:
            report.begin(step)
            limit_seconds = step.seconds * (REHEARSAL_PATIENCE if options.rehearse else 1)
            report.end(step, run_isolated(step, scale, min(limit_seconds, left_seconds), report.add))
        else:
            report.begin(step)
            report.end(step, End("stopped", 0.0, "no time was left"))
    report.write_table(rehearsal=options.rehearse)
    return report.faults


class Report:
    """Writes findings as lines of JSON to stdout and to a file as they arrive.

    Args:
        folder: Folder for `gpu_check.jsonl` and `gpu_check.md`; None for stdout only.

    Attributes:
        faults: Number of failed steps and checks.
    """

    def __init__(self, folder: Path | None) -> None:
        self.faults = 0
        self._folder = folder
        self._findings: dict[str, list[Finding]] = {}
        self._ends: dict[str, End] = {}
        self._step = ""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "gpu_check.jsonl").write_text("", encoding="utf-8")

    def begin(self, step: Step) -> None:
        """Starts a step; the following findings belong to it."""
        self._step = step.name
        self._findings[step.name] = []

    def add(self, finding: Finding) -> None:
        """Writes the line of a finding."""
        self._findings[self._step].append(finding)
        self.faults += isinstance(finding, Check) and not finding.holds
        self._write(to_line(self._step, finding))

    def end(self, step: Step, end: End) -> None:
        """Writes the last line of a step."""
        self._ends[step.name] = end
        self.faults += end.status != "done"
        self._write(
            {"step": step.name, "kind": "end", "status": end.status, "seconds": end.seconds, "error": end.error}
        )

    def write_table(self, *, rehearsal: bool) -> None:
        """Prints the table and writes it to the folder.

        Args:
            rehearsal: Whether this is a rehearsal, with values that are not meaningful.
        """
        gpu = next((item.value for item in self._findings.get("versions", []) if isinstance(item, Measurement)), "GPU")
        title = f"{gpu}, {date.today().isoformat()}" + (" (rehearsal: values are not meaningful)" if rehearsal else "")
        text = markdown(title, self._findings, self._ends)
        print(text, flush=True)
        if self._folder is not None:
            (self._folder / "gpu_check.md").write_text(text, encoding="utf-8")

    def _write(self, line: dict[str, object]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if self._folder is not None:
            with (self._folder / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(min(main(), 100))
