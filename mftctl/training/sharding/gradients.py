"""Selection of gradient entries where each process holds only a part of the gradients."""

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
    """Chooses the entries that one process would choose, from gradients that are put together for it.

    With the scope `tensor` one whole gradient is in memory at a time, with `global` all of them are.

    Args:
        shapes: Of the gradients.
        read: Gives a whole gradient by its index; called in the same order in every process.
        rule: What is chosen.
        step: Number of the step, from 0.
        take: Gets the index of a gradient and its selection, bool and of its shape, True where the entry is updated.
        device: Where random entries are drawn; they are the same ones everywhere.
        excluded: Indices of gradients that are updated whole, and of which nothing is chosen.

    Raises:
        MaskingError: A gradient holds NaN.
    """
    for index in excluded:
        take(index, torch.ones(shapes[index], dtype=torch.bool, device=device))
    indices = [index for index in range(len(shapes)) if index not in excluded]
    if rule.method == "random":
        # Of which only the shapes are asked.
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
