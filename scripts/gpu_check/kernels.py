"""Time and memory of selection and optimizer kernels in isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from mftctl.masking.selection import keep_highest
from mftctl.training.updates.gradient_selection import keep_largest, keep_random
from mftctl.training.updates.stochastic_adamw import StochasticAdamW
from scripts.gpu_check.findings import Measurement
from scripts.gpu_check.measuring import DEVICE, milliseconds, peak_gb_above
from scripts.gpu_check.scale import Scale


def kernels(scale: Scale) -> Iterator[Measurement]:
    """Milliseconds and temporary memory of each kernel."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for entries in scale.entries:
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.randn(entries, generator=generator, device=DEVICE).to(dtype)
            name = f"{entries:,} entries, {str(dtype).removeprefix('torch.')}"
            yield from _measured(f"selection by ratio: {name}", partial(keep_highest, values, 0.1))
            yield from _measured(f"selection of gmt: {name}", partial(keep_largest, [values], 0.2))
        yield from _measured(f"random entries: {entries:,}", partial(keep_random, [values], 0.2, seed=0, step=1))
        yield from _optimizers(entries)


def _optimizers(entries: int) -> Iterator[Measurement]:
    narrow = torch.nn.Parameter(torch.zeros(entries, dtype=torch.bfloat16, device=DEVICE))
    narrow.grad = torch.full_like(narrow, 1e-3)
    stochastic = StochasticAdamW([narrow], eps=1e-8, weight_decay=0.0, seed=0)
    yield from _measured(f"StochasticAdamW: {entries:,} entries", stochastic.step)
    wide = torch.nn.Parameter(torch.zeros(entries, device=DEVICE))
    wide.grad = torch.full_like(wide, 1e-3)
    plain = torch.optim.AdamW([wide])
    yield from _measured(f"AdamW: {entries:,} entries", plain.step)


def _measured(name: str, work: Callable[[], object]) -> Iterator[Measurement]:
    yield Measurement(name, milliseconds(work), "ms")
    yield Measurement(f"{name}, temporary", peak_gb_above(work), "GB")
