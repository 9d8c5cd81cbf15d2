"""Compares plain fine-tuning steps with freed memory kept and with glibc's defaults, each in its own process.

python -m tests.benchmarks.allocator_speed --repetitions 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

from mftctl.runtime.peak_memory import keep_freed_memory
from tests.benchmarks.mask_step_speed import fine_tuning_step
from tests.benchmarks.shapes import SMOLLM2_135M, TINY, micro_batches
from tests.benchmarks.timings import ratios, spread

SHAPES = {"smollm2-135m": SMOLLM2_135M, "tiny": TINY}


def run_steps(shape: str, length_tokens: int, steps: int, *, keep: bool) -> dict[str, float]:
    """Median step time in seconds in this process, and its peak memory."""
    if keep and not keep_freed_memory():
        raise SystemExit("the allocator's settings are not ours to choose here")
    sizes = SHAPES[shape]
    batches = micro_batches(int(sizes["vocab_size"]), count=2, records=2, length_tokens=length_tokens, answer_share=0.6)
    step = fine_tuning_step(sizes, batches)
    step()
    seconds = []
    for _ in range(steps):
        start_seconds = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start_seconds)
    return {"seconds": median(seconds), "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def compare(shape: str, *, length_tokens: int, steps: int, repetitions: int) -> dict[str, str]:
    """Seconds per step, their ratio and peak memory, each as minimum, median and maximum."""
    found: dict[str, list[dict[str, float]]] = {"kept": [], "default": []}
    for repetition in range(repetitions):
        order = ["kept", "default"] if repetition % 2 == 0 else ["default", "kept"]
        for way in order:
            command = [sys.executable, "-m", "tests.benchmarks.allocator_speed", "--child", way, "--shape", shape]
            command += ["--length-tokens", str(length_tokens), "--steps", str(steps)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout))
    seconds = {way: [one["seconds"] for one in results] for way, results in found.items()}
    return {
        **{f"{way}, seconds": spread(values) for way, values in seconds.items()},
        **{f"{way}, peak GB": spread([one["gigabytes"] for one in results]) for way, results in found.items()},
        "kept / default": spread(ratios(seconds["kept"], seconds["default"])),
    }


def main() -> None:
    """Prints the comparison for a model of SmolLM2-135M's shape at 1,024 tokens per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length-tokens", type=int, default=256)
    parser.add_argument("--child", choices=["kept", "default"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        keep = options.child == "kept"
        print(json.dumps(run_steps(options.shape, options.length_tokens, options.steps, keep=keep)))
        return
    found = compare(
        options.shape, length_tokens=options.length_tokens, steps=options.steps, repetitions=options.repetitions
    )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
