"""Compares making and applying delta files with `mftctl apply` of masks, and measures peak memory.

python -m tests.benchmarks.delta_speed --repetitions 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mftctl.masking.checkpoints.delta_mask import drop_mask
from mftctl.masking.mask import save_mask
from tests.benchmarks.apply_speed import Took, make_checkpoint, make_mask
from tests.benchmarks.timings import ratios, spread

_START = """
import re, sys, time
from pathlib import Path
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.delta.make import DeltaPlan, make_delta
from mftctl.masking.delta.records import NamedModel
from mftctl.masking.delta.selection import Selection
from mftctl.masking.mask import open_mask
base, tuned, path, output = map(Path, sys.argv[1:5])
start_seconds, start_cpu_seconds = time.perf_counter(), time.process_time()
"""
_END = """
print(time.perf_counter() - start_seconds, time.process_time() - start_cpu_seconds)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""
_MASK = """
with open_mask(path) as mask:
    second = tuned if mask.metadata.kind == "delta" else None
    apply_to_checkpoint(base, mask, output, mask_path=path, base_model="base", tuned=second)
"""
_DELTA = """
with open_delta(path) as delta:
    apply_delta_to_checkpoint(base, delta, output, base_model="base")
"""
_MAKE = """
plan = DeltaPlan(Selection({ratio}, "{select}"), "{values}")
make_delta(base, tuned, path, plan, base_model=NamedModel("base"), tuned_model=NamedModel("tuned"))
"""
KINDS = {
    "largest 5 %, exact": {"ratio": 0.95, "select": "trivial", "values": "exact"},
    "random 5 %, int8": {"ratio": 0.95, "select": "random", "values": "int8"},
    "everything, exact": {"ratio": 0.0, "select": "trivial", "values": "exact"},
}


def change(base: Path, tuned: Path) -> None:
    """Writes a copy of a checkpoint with small changes to all weights."""
    shutil.copytree(base, tuned)
    generator = torch.Generator().manual_seed(1)
    for path in tuned.glob("*.safetensors"):
        tensors = load_file(path)
        moved = {
            name: (tensor.float() + 1e-4 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        save_file(moved, path, {"format": "pt"})


def run(code: str, *places: Path) -> Took:
    """Runs code in a separate process, excluding its start-up."""
    command = [sys.executable, "-c", _START + code + _END, *map(str, places)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return Took(float(shown[0]), float(shown[1]), int(shown[2]))


def compare(folder: Path, *, hidden_size: int, layers: int, repetitions: int) -> dict[str, str]:
    """Seconds, the ratio to applying a delta mask as minimum, median and maximum, peak memory, and sizes of files."""
    base, tuned, output = folder / "base", folder / "tuned", folder / "output"
    make_checkpoint(base, hidden_size, layers)
    change(base, tuned)
    make_mask(folder / "weight.bits", base, range(layers))
    save_mask(drop_mask(base, tuned, 0.95, "trivial", base_model="b", tuned_model="t"), folder / "delta.bits")
    ways: dict[str, Callable[[], Took]] = {
        "apply a delta mask": lambda: run(_MASK, base, tuned, folder / "delta.bits", output),
        "apply a weight mask": lambda: run(_MASK, base, tuned, folder / "weight.bits", output),
    }
    for number, (kind, options) in enumerate(KINDS.items()):
        path, code = folder / f"{number}.delta", _MAKE.format(**options)
        ways[f"make a delta file, {kind}"] = lambda path=path, code=code: run(code, base, tuned, path, output)
        ways[f"apply a delta file, {kind}"] = lambda path=path: run(_DELTA, base, tuned, path, output)
    took: dict[str, list[Took]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            shutil.rmtree(output, ignore_errors=True)
            os.sync()  # no variant waits for pending writes of the previous one
            took[name].append(way())
    size_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = {"checkpoint, bytes": f"{size_bytes:,}"}
    for name, runs in took.items():
        found[f"{name}, seconds"] = spread([one.seconds for one in runs])
        found[f"{name} / apply a delta mask"] = spread(
            ratios([one.seconds for one in runs], [one.seconds for one in took["apply a delta mask"]])
        )
        found[f"{name}, peak bytes"] = f"{max(one.peak_bytes for one in runs):,}"
    for number, kind in enumerate(KINDS):
        file_bytes = (folder / f"{number}.delta").stat().st_size
        found[f"{kind}, share of the checkpoint"] = f"{file_bytes / size_bytes:.2%}"
    return found


def main() -> None:
    """Prints the comparison for a checkpoint of about 1.2 GB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=1280)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            Path(folder),
            hidden_size=options.hidden_size,
            layers=options.layers,
            repetitions=options.repetitions,
        )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
