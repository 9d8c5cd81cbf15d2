"""Mask-file codecs: bits per weight against the mask's entropy, and weights per second on one core.

python -m tests.benchmarks.codec_speed --repetitions 5
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Final

import numpy as np

from mftctl.masking.mask_file.codecs import Codec, count_kept, decode, encode
from tests.benchmarks.timings import spread

CODECS: Final[tuple[Codec, ...]] = ("packed", "deflate", "ans")
RATIOS: Final = (0.02, 0.1, 0.4)


def compare(weights: int, repetitions: int) -> dict[str, str]:
    """Size per codec and ratio, and speed in both directions as minimum, median and maximum."""
    found = {}
    for ratio in RATIOS:
        packed = np.packbits(np.random.default_rng(0).random(weights) >= ratio, bitorder="little")
        removed = weights - count_kept(packed)
        share = removed / weights
        entropy_bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        for codec in CODECS:
            speeds: dict[str, list[float]] = {"encode": [], "decode": []}
            for _ in range(repetitions):
                start_seconds = time.process_time()
                payload = encode(packed, codec)
                middle_seconds = time.process_time()
                decode(payload, codec, weights, removed, path=Path("mask.bits"), key="w")
                end_seconds = time.process_time()
                speeds["encode"].append(weights / (middle_seconds - start_seconds) / 1e6)
                speeds["decode"].append(weights / (end_seconds - middle_seconds) / 1e6)
            name = f"{codec} at {ratio}"
            found[f"{name}, bits a weight / entropy"] = f"{8 * len(payload) / weights / entropy_bits:.5f}"
            found |= {f"{name}, {way}, million weights a second": spread(values) for way, values in speeds.items()}
    return found


def main() -> None:
    """Prints the comparison for masks that remove weights at random from 64 million."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=64_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    for name, text in compare(options.weights, options.repetitions).items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
