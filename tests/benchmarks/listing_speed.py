"""Time to read a folder with thousands of runs, once for a report and repeatedly for `report --watch`.

python -m tests.benchmarks.listing_speed FOLDER --runs 3000
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import create_run, list_runs, run_folders
from mftctl.reporting.watch import Following
from tests.benchmarks.timings import seconds_in_turn, spread
from tests.partial_results import partial_result

_COMMANDS = ("fft", "mask-train", "eval", "eval")


def write_runs(root: Path, runs: int) -> int:
    """Writes finished runs of one experiment, each with a mask record of 30 layers; returns the size of a record."""
    recipe = load_recipe("quickstart")
    digests = {"train": "0" * 64, "validation": "1" * 64}
    run = create_run(
        root,
        _COMMANDS[0],
        to_document(recipe),
        recipe="quickstart",
        inputs={"model": "m" * 60, "parents": ["001-fft"], "origin": "quickstart", "digests": digests},
        stage="mft",
        digest="2" * 64,
        decides={"command": "mask-train", **deciding_keys(recipe, "mask-train"), "files": {"train.jsonl": "3" * 64}},
    )
    rounds = [
        {"step": step, "removed": 64058, "restored": 10600, "promised": 1 / step, "measured": 1 / step}
        for step in range(1, 9)
    ]
    ratios = {str(layer): 0.1 + 1e-9 * layer for layer in range(30)}
    run.finish(
        partial_result(
            {"state": "MFT", "layer_ratios": ratios, "best_loss": 0.6, "steps": 32, "flips": {"rounds": rounds}}
        )
    )
    record = run.folder / "run.json"
    for number in range(2, runs + 1):
        folder = root / f"{number:03d}-{_COMMANDS[number % len(_COMMANDS)]}"
        folder.mkdir()
        for name in ("run.json", "config.yaml"):
            shutil.copyfile(run.folder / name, folder / name)
    return record.stat().st_size


def compare(root: Path, runs: int, repetitions: int) -> dict[str, str]:
    """Seconds per way of reading the folder, as minimum, median and maximum.

    Args:
        root: Folder to write the runs to; must not exist yet.
        runs: Number of runs.
        repetitions: Repetitions per way.
    """
    record_bytes = write_runs(root, runs)
    watched = Following(root)
    watched.refresh()
    ways = {
        "names of the folders": lambda: run_folders(root),
        "all records": lambda: list_runs(root),
        "first look of --watch": lambda: Following(root).refresh(),
        "each further look": watched.refresh,
    }
    found = seconds_in_turn(ways, repetitions)
    return {
        "runs": f"{runs:,}, records of {record_bytes:,} bytes",
        **{f"{name}, seconds": spread(seconds) for name, seconds in found.items()},
    }


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    for name, text in compare(options.folder / "runs", options.runs, options.repetitions).items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
