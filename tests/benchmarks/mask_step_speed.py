"""Compares mask-training steps with plain fine-tuning, with masks sorted at each forward pass, and with reuse.

python -m tests.benchmarks.mask_step_speed --repetitions 5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.masking.layers import attach_masks, initial_scores, masked_layers
from mftctl.masking.rule import MaskRule
from mftctl.masking.targets import find_targets
from mftctl.training.answer_loss import answer_loss
from mftctl.training.prefix_cache import HiddenStates, reusing_prefix
from tests.benchmarks.shapes import SMOLLM2_135M, build, micro_batches
from tests.benchmarks.timings import ratios, seconds_in_turn, spread

RATIO = 0.1
Batches = list[dict[str, torch.Tensor]]


class SortedMask(nn.Module):
    """A masked projection as in the reference implementation: each forward pass sorts the scores to build the mask."""

    def __init__(self, linear: nn.Linear, scores: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scores = linear.weight.requires_grad_(False), nn.Parameter(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * _Sorted.apply(self.scores.abs()))


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        order = scores.flatten().sort().indices
        mask = torch.ones_like(scores).flatten()
        mask[order[: int(RATIO * scores.numel())]] = 0.0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def fine_tuning_step(shape: dict[str, int | bool], batches: Batches) -> Callable[[], None]:
    """An AdamW step on all weights, with the loss of transformers."""
    model = build(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    return lambda: _plain_step(model, optimizer, batches)


def sorted_step(shape: dict[str, int | bool], layers: list[int], batches: Batches) -> Callable[[], None]:
    """An AdamW step on the scores of masks that are sorted at each forward pass."""
    model = build(shape).requires_grad_(False)
    for target in find_targets(model, layers):
        parent, _, name = target.name.rpartition(".")
        masked = SortedMask(target.module, initial_scores(target, "kaiming"))
        setattr(model.get_submodule(parent), name, masked)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4)
    return lambda: _plain_step(model, optimizer, batches)


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for batch in batches:
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def mask_step(
    shape: dict[str, int | bool], layers: list[int], batches: Batches
) -> tuple[Callable[[], None], nn.Module]:
    """A step of mftctl's mask training, and the masked model."""
    model = build(shape)
    targets = find_targets(model, layers)
    scores = {target.name: initial_scores(target, "kaiming") for target in targets}
    attach_masks(model, targets, scores, MaskRule(RATIO))
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4)

    def step() -> None:
        found = [answer_positions(batch["labels"]) for batch in batches]
        answer_tokens = sum(len(tokens) for _, tokens in found)
        for batch, (positions, tokens) in zip(batches, found, strict=True):
            with logits_only_at(model, positions):
                outputs = model(input_ids=batch["input_ids"], use_cache=False)
            answer_loss(outputs, positions, tokens, answer_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def selection_seconds(model: nn.Module) -> float:
    """Time to build all masks and masked weights once."""
    for _, module in masked_layers(model):
        module.scores.data.mul_(1.0)  # bumps the version of the scores
        module._scores_state = None
    start_seconds = time.perf_counter()
    for _, module in masked_layers(model):
        module.masked_weight()
    return time.perf_counter() - start_seconds


def compare(
    shape: dict[str, int | bool], layers: list[int], *, length_tokens: int, answer_share: float, repetitions: int
) -> dict[str, str]:
    """Seconds, ratios and the share of time spent on selection, each as minimum, median and maximum."""
    batches = micro_batches(
        int(shape["vocab_size"]), count=2, records=2, length_tokens=length_tokens, answer_share=answer_share
    )
    ours, model = mask_step(shape, layers, batches)
    again, other = mask_step(shape, layers, batches)
    ways = {
        "fine-tuning": fine_tuning_step(shape, batches),
        "mask, sorted at each forward": sorted_step(shape, layers, batches),
        "mask": ours,
        "mask, batches seen before": again,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        HiddenStates(Path(folder), 1 << 30, 0) as states,
        reusing_prefix(other, min(layers), states, print, in_training=True),
    ):
        for step in ways.values():
            step()  # the first step creates the optimizer state and the reused hidden states
        seconds = seconds_in_turn(ways, repetitions)
    selection = [selection_seconds(model) / total for total in seconds["mask"]]
    return {
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        "mask / fine-tuning": spread(ratios(seconds["mask"], seconds["fine-tuning"])),
        "mask, batches seen before / mask": spread(ratios(seconds["mask, batches seen before"], seconds["mask"])),
        "mask, batches seen before / fine-tuning": spread(
            ratios(seconds["mask, batches seen before"], seconds["fine-tuning"])
        ),
        "sorted / mask": spread(ratios(seconds["mask, sorted at each forward"], seconds["mask"])),
        "sorted / mask, batches seen before": spread(
            ratios(seconds["mask, sorted at each forward"], seconds["mask, batches seen before"])
        ),
        "selection and masking, share of a step": spread(selection),
    }


def main() -> None:
    """Prints the comparison for a model of SmolLM2-135M's shape, layers 12-15, at 1,024 tokens per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--answer-share", type=float, default=0.6)
    options = parser.parse_args()
    found = compare(
        SMOLLM2_135M,
        [12, 13, 14, 15],
        length_tokens=256,
        answer_share=options.answer_share,
        repetitions=options.repetitions,
    )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
