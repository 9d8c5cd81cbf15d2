"""Fused experts with scores for each of their tensors as stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mftctl.masking.full_tensor import whole
from mftctl.masking.mask_file.codecs import Packed
from mftctl.masking.rule import Rule, scores_state
from mftctl.masking.soft_mask import SoftRule
from mftctl.masking.targets import MaskTarget


class MaskedPart(nn.Module):
    """Scores for one stored tensor within a fused parameter, such as the gate projection of one expert.

    Attributes:
        target: What is masked.
        scores: Trainable scores of the stored tensor's shape, in fp32 unless given in another dtype.
        rule: The rule from scores to mask.
        base: The frozen tensor before fine-tuning, which removed weights return to; None if they become 0.
    """

    def __init__(self, target: MaskTarget, scores: torch.Tensor, rule: Rule, base: torch.Tensor | None = None) -> None:
        super().__init__()
        self.target = target
        self.base = None if base is None else nn.Parameter(base, requires_grad=False)
        self.scores = nn.Parameter(scores)
        self.rule = rule

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, a view of the fused parameter."""
        return self.target.weight

    def stored_mask(self) -> Packed:
        """The present mask as bits, or as one byte per weight of a soft mask."""
        return self.rule.stored(whole(self.scores))

    def mask(self) -> torch.Tensor:
        """The present mask of the weight's shape: bool, True = keep, or the uint8 codes of a soft mask."""
        scores = whole(self.scores)
        return self.rule.codes(scores) if isinstance(self.rule, SoftRule) else self.rule.keep(scores)

    def extra_repr(self) -> str:
        """Name, shape and rule, for `print(model)`."""
        return f"{self.target.name}, {tuple(self.scores.shape)}, {self.rule}"


class MaskedExperts(nn.Module):
    """The frozen experts of a layer, fused in parameters `(experts, ...)`, with a mask for each stored tensor.

    Computes the experts' output with their configured kernel, with W * M in place of W, or B + M * (W - B) for parts
    with a base. The products are recomputed only when scores have changed, that is once per optimizer step rather than
    in every forward pass.

    Attributes:
        experts: The original module; its parameters are not modified.
        parts: The scores of each masked stored tensor.

    Args:
        experts: Any module.
        parts: At least one part, each belonging to one of the module's own parameters.

    Source: MFT, equations 4 and 5.
    """

    def __init__(self, experts: nn.Module, parts: Sequence[MaskedPart]) -> None:
        super().__init__()
        self.experts = experts.requires_grad_(False)
        self.parts = nn.ModuleList(parts)
        self._parts: dict[str, list[MaskedPart]] = {}
        for part in parts:
            self._parts.setdefault(part.target.parameter, []).append(part)
        self._products: dict[str, tuple[tuple[object, ...], torch.Tensor]] = {}

    def original(self) -> nn.Module:
        """The module that this one replaced."""
        return self.experts

    @torch.no_grad()
    def product(self, parameter: str) -> torch.Tensor:
        """The masked values of a fused parameter, of its shape and dtype, recomputed only if scores have changed.

        Args:
            parameter: The parameter's name in the original module.
        """
        weight, parts = self.experts.get_parameter(parameter), self._parts[parameter]
        state = (*(part.rule for part in parts), *scores_state(part.scores for part in parts))
        known, product = self._products.get(parameter, (None, weight))
        if state != known or product.device != weight.device:
            product = weight.clone()
            for part in parts:
                own = part.target.part_of(product)
                own.copy_(part.rule.product(own, whole(part.scores), part.base))
            self._products[parameter] = state, product
        return product

    def products(self) -> list[torch.Tensor]:
        """The masked values of every masked parameter."""
        return [self.product(parameter) for parameter in self._parts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's output for these arguments, with masked weights."""
        products = {parameter: self._differentiable(parameter) for parameter in self._parts}
        return functional_call(self.experts, products, args, kwargs)

    def _differentiable(self, parameter: str) -> torch.Tensor:
        """The product of a parameter; its gradient flows to the scores."""
        product: torch.Tensor = _StraightThroughProduct.apply(  # type: ignore[no-untyped-call]
            self.product(parameter),
            self.experts.get_parameter(parameter),
            self._parts[parameter],
            *(part.scores for part in self._parts[parameter]),
        )
        return product


class _StraightThroughProduct(torch.autograd.Function):
    """The masked values V of a fused parameter, with a straight-through gradient for the scores.

    The rule of each part makes the gradient of its scores from dL/dV.

    Source: MFT, equation 5.
    """

    @staticmethod
    def forward(
        ctx: Any, product: torch.Tensor, weight: torch.Tensor, parts: Sequence[MaskedPart], *scores: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, *scores)
        ctx.parts = parts
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, grad_product: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *scores = ctx.saved_tensors
        grads: list[torch.Tensor | None] = []
        for part, values, needed in zip(ctx.parts, scores, ctx.needs_input_grad[3:], strict=True):
            if not needed:
                grads.append(None)
                continue
            target = part.target
            wide = torch.promote_types(values.dtype, torch.float32)
            grad = target.part_of(grad_product).to(wide, copy=True)
            grads.append(part.rule.score_gradient(grad, values, target.part_of(weight), part.base).to(values.dtype))
        return None, None, None, *grads
