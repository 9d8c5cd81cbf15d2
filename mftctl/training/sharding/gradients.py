"""Selection of gradient entries if gradients are sharded across processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from mftctl.training.updates.gradient_selection import keep_largest, keep_random
from mftctl.training.updates.masked_optimizer import UpdateRule


def select_whole(
    shapes: Sequence[torch.Size],
    read: Callable[[int], torch.Tensor],
    rule: UpdateRule,
    step: int,
    take: Callable[[int, torch.Tensor], None],
    *,
    device: torch.device,
    excluded: Collection[int] = (),
) -> None:
    """Selects the same entries as a single process would, from gathered gradients.

    With scope `tensor`, one whole gradient is in memory at a time; with `global`, all of them are.

    Args:
        shapes: The shapes of the gradients.
        read: Returns a whole gradient by its index; called in the same order in every process.
        rule: Decides which entries are selected.
        step: Step number, from 0.
        take: Receives the index of a gradient and its selection, a bool tensor of its shape, True where updated.
        device: The device for drawing random entries, which are the same on every device.
        excluded: Indices of gradients whose entries are all updated.

    Raises:
        MaskingError: A gradient contains NaN.
    """
    for index in excluded:
        take(index, torch.ones(shapes[index], dtype=torch.bool, device=device))
    indices = [index for index in range(len(shapes)) if index not in excluded]
    if rule.method == "random":
        # Only their shapes are used.
        blank = [torch.zeros(1, device=device).expand(shapes[index]) for index in indices]
        masks = keep_random(blank, rule.ratio, rule.scope, seed=rule.seed, step=step)
    elif rule.scope == "global":
        masks = keep_largest([read(index) for index in indices], rule.ratio, rule.scope)
    else:
        for index in indices:
            take(index, keep_largest([read(index)], rule.ratio)[0])
        return
    for index, mask in zip(indices, masks, strict=True):
        take(index, mask)
