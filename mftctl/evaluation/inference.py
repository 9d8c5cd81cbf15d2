"""Inference over many samples: without gradients, in evaluation mode, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

OnProgress = Callable[[int, int], None]
"""Called with the number of samples done and the total."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode and disables gradients; restores each module's mode on exit.

    Args:
        model: Any torch module.
    """
    # Plain no_grad: tensors created under torch.inference_mode could not be used in a later training step, and masked
    # layers cache their product.
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def length_batches(lengths_tokens: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Batches of sample indices, longest samples first, so that running out of memory shows at once.

    Args:
        lengths_tokens: The length of each sample.
        budget_tokens: Maximum tokens per batch, including padding. A longer sample gets its own batch.

    Returns:
        Every index once. Samples of equal length keep their order.
    """
    order = sorted(range(len(lengths_tokens)), key=lambda index: -lengths_tokens[index])
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths_tokens[batches[-1][0]] <= budget_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
