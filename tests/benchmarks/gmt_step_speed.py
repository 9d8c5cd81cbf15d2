"""Compares a Gradient-Mask Tuning step with a plain fine-tuning step.

python -m tests.benchmarks.gmt_step_speed --repetitions 5
python -m tests.benchmarks.gmt_step_speed --micro-batches 16 --fused --cpu-time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from mftctl.training.updates.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.benchmarks.shapes import SMOLLM2_135M, build, micro_batches
from tests.benchmarks.timings import ratios, seconds_in_turn, spread


def compare(
    shape: dict[str, int | bool],
    *,
    length_tokens: int,
    repetitions: int,
    micro_batch_count: int = 2,
    fused: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, str]:
    """Seconds and ratios, each as minimum, median and maximum.

    Args:
        shape: Model shape.
        length_tokens: Length of each of the two records in a micro-batch.
        repetitions: Timed steps per variant.
        micro_batch_count: Micro-batches per step.
        fused: Use torch's fused AdamW kernel on both sides.
        clock: Returns the current time in seconds.
    """
    batches = micro_batches(
        int(shape["vocab_size"]), count=micro_batch_count, records=2, length_tokens=length_tokens, answer_share=1.0
    )

    def step_of(rule: UpdateRule | None) -> Callable[[], None]:
        model = build(shape)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
        optimizer = inner if rule is None else MaskedOptimizer(inner, rule)

        def step() -> None:
            for batch in batches:
                (model(**batch, use_cache=False).loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first step creates the optimizer state
        return step

    ways = {
        "fine-tuning": step_of(None),
        "GMT, tensor": step_of(UpdateRule("gmt", 0.2)),
        "GMT, global": step_of(UpdateRule("gmt", 0.2, "global")),
    }
    seconds = seconds_in_turn(ways, repetitions, clock)
    return {
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        **{f"{name} / fine-tuning": spread(ratios(seconds[name], seconds["fine-tuning"])) for name in list(ways)[1:]},
    }


def main() -> None:
    """Prints the comparison for a model of SmolLM2-135M's shape, by default at 1,024 tokens per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=2, help="of 512 tokens each")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, on both sides")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where the machine is shared")
    options = parser.parse_args()
    found = compare(
        SMOLLM2_135M,
        length_tokens=256,
        repetitions=options.repetitions,
        micro_batch_count=options.micro_batches,
        fused=options.fused,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
