"""Checks that a CPU and a GPU select identical masks from the same values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from mftctl.masking.selection import keep_above, keep_highest, rank
from mftctl.training.updates.gradient_selection import keep_largest, keep_random
from scripts.gpu_check.findings import Check
from scripts.gpu_check.measuring import DEVICE
from scripts.gpu_check.scale import Scale

_RATIO = 0.1


def equal_masks(scale: Scale) -> Iterator[Check]:
    """Every rule, on scores and gradients with ties and zeros of both signs, in fp32 and bf16."""
    for entries in scale.entries:
        for name, values in _numbers(entries).items():
            on_gpu = values.to(DEVICE)
            for ranking in ("absolute", "signed"):
                yield _scores(f"{name}, {entries:,} entries", values, on_gpu, ranking)
            yield Check(
                f"threshold: {name}, {entries:,} entries",
                torch.equal(keep_above(values, 0.0), keep_above(on_gpu, 0.0).cpu()),
            )
            mine, its = keep_largest([on_gpu], _RATIO)[0].cpu(), keep_largest([values], _RATIO)[0]
            yield Check(f"gmt: {name}, {entries:,} entries", torch.equal(mine, its))
        mine = keep_random([on_gpu], _RATIO, seed=1, step=2)[0].cpu()
        its = keep_random([values], _RATIO, seed=1, step=2)[0]
        yield Check(f"random: {entries:,} entries", torch.equal(mine, its))


def _scores(name: str, values: torch.Tensor, on_gpu: torch.Tensor, ranking: Literal["absolute", "signed"]) -> Check:
    mine = keep_highest(rank(on_gpu, ranking), _RATIO).cpu()
    its = keep_highest(rank(values, ranking), _RATIO)
    different = int((mine != its).sum())
    return Check(f"{ranking}: {name}", different == 0, f"{different} differ" if different else "")


def _numbers(entries: int) -> dict[str, torch.Tensor]:
    """Normal values, and values with many ties, of which a third are zeros of both signs."""
    generator = torch.Generator().manual_seed(entries)
    normal = torch.randn(entries, generator=generator)
    tied = (normal * 4).round() / 4
    zeros = torch.rand(entries, generator=generator)
    tied[zeros < 0.15] = 0.0
    tied[zeros > 0.85] = -0.0
    return {"fp32": normal, "fp32, ties and zeros": tied, "bf16": normal.bfloat16(), "bf16, ties": tied.bfloat16()}
