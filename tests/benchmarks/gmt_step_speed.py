"""A step of Gradient-Mask Tuning beside a step of plain fine-tuning.

python -m tests.benchmarks.gmt_step_speed --repetitions 5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from mftctl.tuning.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.benchmarks.shapes import SMOLLM2_135M, build, micro_batches
from tests.benchmarks.timings import ratios, seconds_in_turn, spread


def compare(shape: dict[str, int | bool], *, length_tokens: int, repetitions: int) -> dict[str, str]:
    """Seconds and ratios, each as minimum, median and maximum."""
    batches = micro_batches(int(shape["vocab_size"]), count=2, records=2, length_tokens=length_tokens, answer_share=1.0)

    def step_of(rule: UpdateRule | None) -> Callable[[], None]:
        model = build(shape)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-6)
        optimizer = inner if rule is None else MaskedOptimizer(inner, rule)

        def step() -> None:
            for batch in batches:
                (model(**batch, use_cache=False).loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first makes the optimizer's state
        return step

    ways = {
        "fine-tuning": step_of(None),
        "GMT, tensor": step_of(UpdateRule("gmt", 0.2)),
        "GMT, global": step_of(UpdateRule("gmt", 0.2, "global")),
    }
    seconds = seconds_in_turn(ways, repetitions)
    return {
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        **{f"{name} / fine-tuning": spread(ratios(seconds[name], seconds["fine-tuning"])) for name in list(ways)[1:]},
    }


def main() -> None:
    """Prints the comparison for a model of SmolLM2-135M's shape, 1,024 tokens a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    for name, text in compare(SMOLLM2_135M, length_tokens=256, repetitions=parser.parse_args().repetitions).items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
