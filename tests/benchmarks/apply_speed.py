"""Compares `mftctl apply` with `cp -r`, with all layers masked and with 4 of 30, and measures its peak memory.

python -m tests.benchmarks.apply_speed --repetitions 5
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mftctl.masking.checkpoints.tensors import tensor_digest, tensor_index
from mftctl.masking.mask import Mask, save_mask
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord
from tests.benchmarks.timings import ratios, spread

_APPLY = """
import re, sys, time
from pathlib import Path
from mftctl.masking.mask import open_mask
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
base, path, output = map(Path, sys.argv[1:])
start_seconds, start_cpu_seconds = time.perf_counter(), time.process_time()
with open_mask(path) as mask:
    apply_to_checkpoint(base, mask, output, mask_path=path, base_model="base")
print(time.perf_counter() - start_seconds, time.process_time() - start_cpu_seconds)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@dataclass(frozen=True)
class Took:
    """Wall-clock and CPU time of an operation, and its peak memory where known."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0


def make_checkpoint(folder: Path, hidden_size: int, layers: int) -> None:
    """Saves a random Llama in bf16, in shards of 500 MB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=1024, num_attention_heads=8, num_key_value_heads=4, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def make_mask(path: Path, base: Path, layers: Sequence[int]) -> list[str]:
    """Writes a mask that removes 10 % of every projection in these layers, and returns the projections' names."""
    generator = torch.Generator().manual_seed(0)
    tensors, records = {}, {}
    for name, stored in tensor_index(base).items():
        place = re.search(r"layers\.(\d+)\..*proj", name)
        if place and int(place[1]) in layers:
            keep = torch.rand(stored.shape, generator=generator) >= 0.1
            tensors[name] = keep
            records[name] = TensorRecord(
                stored.shape, keep.numel() - int(keep.sum()), tensor_digest(stored), stored.dtype
            )
    metadata = MaskMetadata(
        kind="weight",
        base_model=str(base),
        base_revision=None,
        method="random",
        ratio=0.1,
        threshold=None,
        layers=None,
        seed=0,
        run_id=None,
    )
    save_mask(Mask(tensors, records, metadata), path)
    return list(tensors)


def copy(base: Path, output: Path) -> Took:
    """Copies with `cp -r`."""
    start, start_seconds = os.times(), time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(output)], check=True)
    seconds, end = time.perf_counter() - start_seconds, os.times()
    cpu_seconds = end.children_user + end.children_system - start.children_user - start.children_system
    return Took(seconds, cpu_seconds)


def apply(base: Path, mask: Path, output: Path) -> Took:
    """Applies a mask in a separate process, excluding its startup time."""
    command = [sys.executable, "-c", _APPLY, str(base), str(mask), str(output)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return Took(float(shown[0]), float(shown[1]), int(shown[2]))


def digest(base: Path, names: Sequence[str]) -> Took:
    """Only hashes tensors, one thread per processor: the minimum work of `apply`."""
    index = tensor_index(base)
    start_seconds, start_cpu_seconds = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(tensor_digest, [index[name] for name in names]))
    return Took(time.perf_counter() - start_seconds, time.process_time() - start_cpu_seconds)


def compare(folder: Path, *, hidden_size: int, layers: int, some: Sequence[int], repetitions: int) -> dict[str, str]:
    """Seconds and ratios, each as minimum, median and maximum, and the peak memory of `apply`."""
    base, output = folder / "base", folder / "output"
    make_checkpoint(base, hidden_size, layers)
    masked = {"all layers": range(layers), f"{len(some)} of {layers} layers": some}
    names = {case: make_mask(folder / f"{case}.bits", base, chosen) for case, chosen in masked.items()}
    ways: dict[str, Callable[[], Took]] = {"cp -r": lambda: copy(base, output)}
    for case in masked:
        ways[f"apply, {case}"] = lambda case=case: apply(base, folder / f"{case}.bits", output)
        ways[f"SHA-256 alone, {case}"] = lambda case=case: digest(base, names[case])
    took: dict[str, list[Took]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        first = repetition % len(ways)
        for name in [*ways][first:] + [*ways][:first]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()  # no variant waits for pending writes of the previous one
            took[name].append(ways[name]())
    found = {"checkpoint, bytes": f"{sum(path.stat().st_size for path in base.iterdir()):,}"}
    for name, runs in took.items():
        found[f"{name}, seconds"] = spread([run.seconds for run in runs])
        found[f"{name}, seconds of one processor"] = spread([run.cpu_seconds for run in runs])
        if name != "cp -r":
            found[f"{name} / cp -r"] = spread(
                ratios([run.seconds for run in runs], [run.seconds for run in took["cp -r"]])
            )
        if name.startswith("apply"):
            found[f"{name}, peak bytes"] = f"{max(run.peak_bytes for run in runs):,}"
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
            some=range(12, 16),
            repetitions=options.repetitions,
        )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
