"""Linear layers with a score per weight, trained through the mask that the scores select."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mftctl.errors import MaskingError, TrainingError
from mftctl.masking.experts import MaskedExperts, MaskedPart
from mftctl.masking.full_tensor import whole
from mftctl.masking.mask_file.codecs import Packed
from mftctl.masking.masked_values import removable
from mftctl.masking.rule import Rule, scores_state
from mftctl.masking.selection import Cut
from mftctl.masking.soft_mask import SoftRule
from mftctl.masking.targets import MaskTarget

DEFAULT_START_STD = 0.02
"""Used for models whose configuration has no `initializer_range`."""


class MaskedLinear(nn.Module):
    """A frozen linear projection whose weights are masked according to trainable scores.

    Computes `x @ (W * M)^T + b` or, with a base, `x @ (B + M * (W - B))^T + b`, for a mask M of zeros and ones or, of a
    soft rule, multipliers. The mask and the masked weight are
    recomputed only when the scores have changed, that is once per optimizer step rather than in every forward pass.

    Attributes:
        weight: The frozen weight: `(out_features, in_features)`, or `(in_features, out_features)` of a Conv1D.
        base: The frozen weight before fine-tuning, which removed weights return to; None if they become 0.
        bias: The frozen bias `(out_features,)`, or None.
        scores: Trainable scores of the weight's shape, in fp32 unless given in another dtype.
        rule: The rule from scores to mask; it may be replaced by another one of its kind.
        passes_all: Whether it computes as if there were no mask; see `unmasked`.
        keeps_product: Whether the masked weight is cached between passes. Otherwise each pass recomputes it from the
            threshold found when the scores changed, to save memory or because each process holds only a shard.

    Source: MFT, equations 4 and 5.
    """

    def __init__(
        self, linear: nn.Linear | Conv1D, scores: torch.Tensor, rule: Rule, base: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.base = None if base is None else nn.Parameter(base, requires_grad=False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.scores = nn.Parameter(scores)
        self.rule = rule
        self.keeps_product = True
        self.passes_all = False
        self.transposed = isinstance(linear, Conv1D)
        self._linear = (linear,)  # in a tuple, so that it is not a submodule and its weight is not listed twice
        self._state: tuple[object, ...] | None = None
        self._masked_weight: torch.Tensor = torch.empty(0)
        self._cut: Cut | None = None

    def stored_mask(self) -> Packed:
        """The present mask as bits, or as one byte per weight of a soft mask."""
        return self.rule.stored(whole(self.scores))

    def mask(self) -> torch.Tensor:
        """The present mask of the weight's shape: bool, True = keep, or the uint8 codes of a soft mask."""
        scores = whole(self.scores)
        return self.rule.codes(scores) if isinstance(self.rule, SoftRule) else self.rule.keep(scores)

    def original(self) -> nn.Linear | Conv1D:
        """The module that this one replaced; it shares the frozen weight."""
        return self._linear[0]

    @torch.no_grad()
    def masked_weight(self) -> torch.Tensor:
        """The masked weight, of the weight's shape and dtype, recomputed only if the scores have changed."""
        if self.passes_all:
            return self.weight
        state = (self.rule, *scores_state([self.scores]))
        if not self.keeps_product:
            if state != self._state:
                self._cut, self._state = self.rule.cut(self.scores.detach()), state
            return self._product(self.scores.detach(), self._cut)
        if state != self._state or self._masked_weight.device != self.weight.device:
            self._masked_weight, self._state = self._product(whole(self.scores)), state
        return self._masked_weight

    def _product(self, scores: torch.Tensor, cut: Cut | None = None) -> torch.Tensor:
        return self.rule.product(self.weight, scores, self.base, cut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The projection of `x` `(..., in_features)` to `(..., out_features)`."""
        y: torch.Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            x,
            self.scores,
            self.masked_weight(),
            self.weight,
            self.base,
            self.bias,
            self.transposed,
            self.rule,
            None if self.keeps_product else self.masked_weight,
        )
        return y

    def extra_repr(self) -> str:
        """Shape and rule, for `print(model)`."""
        return f"{tuple(self.weight.shape)}, {self.rule}"


class _StraightThrough(torch.autograd.Function):
    """`x @ V^T + b` for the masked weight V, with a straight-through gradient for the scores.

    The rule makes the gradient of the scores from dL/dV.

    Source: MFT, equation 5.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scores: torch.Tensor,
        masked_weight: torch.Tensor,
        weight: torch.Tensor,
        base: torch.Tensor | None,
        bias: torch.Tensor | None,
        transposed: bool,
        rule: Rule,
        make_again: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        # Under autocast the surrounding layers use the lower precision; a custom function must cast by itself.
        compute_dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        )
        x, masked_weight = x.to(compute_dtype), masked_weight.to(compute_dtype)
        ctx.save_for_backward(x, scores, masked_weight if make_again is None else None, weight, base)
        ctx.make_again = make_again
        ctx.transposed = transposed
        ctx.rule = rule
        # The bias belongs in the same kernel; added afterwards, it would round differently from the unmasked layer.
        bias = bias if bias is None else bias.to(compute_dtype)
        if not transposed:
            return F.linear(x, masked_weight, bias)
        if bias is None:
            return x @ masked_weight
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), masked_weight)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scores, masked_weight, weight, base = ctx.saved_tensors
        grad_x = grad_scores = None
        if ctx.needs_input_grad[0]:
            if masked_weight is None:
                masked_weight = ctx.make_again().to(grad_output.dtype)
            grad_x = grad_output @ (masked_weight.t() if ctx.transposed else masked_weight)
        if ctx.needs_input_grad[1]:
            rows_x = x.reshape(-1, x.shape[-1])
            rows_grad = grad_output.reshape(-1, grad_output.shape[-1])
            grad_masked = rows_x.t() @ rows_grad if ctx.transposed else rows_grad.t() @ rows_x
            wide = torch.promote_types(scores.dtype, torch.float32)
            grad_scores = ctx.rule.score_gradient(grad_masked.to(wide), scores, weight, base).to(scores.dtype)
        return grad_x, grad_scores, None, None, None, None, None, None, None


ScoreStart = Literal["normal", "kaiming", "constant", "weights", "identity"]


def initial_scores(
    target: MaskTarget,
    start: ScoreStart,
    *,
    std: float = DEFAULT_START_STD,
    constant: float = 0.01,
    seed: int = 0,
    weight: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """The initial scores of a target, fp32, of its weight's shape and on its device.

    Args:
        target: The projection to mask.
        start: `normal`: N(0, std); `kaiming`: U(-1/sqrt(fan_in), 1/sqrt(fan_in)); `constant`: all equal;
            `weights`: the absolute value of the weight or, with a base, of its change; `identity`: 1, for soft masks.
        std: Standard deviation of the normal start.
        constant: Value of the constant start.
        seed: Together with the target's name, decides the values, independently of other targets.
        weight: Values of the target's weight, if the target itself has none.
        base: The weight before fine-tuning, for a delta mask.

    Source: the authors' implementation of MFT. Its layers request Kaiming-uniform (a = sqrt(5)), but loading a
        checkpoint then draws all scores from N(0, initializer_range) instead, in bf16; this draws in fp32.
    """
    weight = target.weight if weight is None else weight
    if start == "weights":
        return removable(weight.detach(), base, torch.float32).abs().float()
    if start == "identity":
        return torch.ones(weight.shape, dtype=torch.float32, device=weight.device)
    if start == "constant":
        return torch.full(weight.shape, constant, dtype=torch.float32, device=weight.device)
    digest = hashlib.sha256(f"{seed}:{target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    scores = torch.empty(weight.shape, dtype=torch.float32)
    if start == "normal":
        scores.normal_(0.0, std, generator=generator)
    else:
        bound = kaiming_bound(target)
        scores.uniform_(-bound, bound, generator=generator)
    return scores.to(weight.device)


def kaiming_bound(target: MaskTarget) -> float:
    """1 / sqrt(fan_in), the largest score of the Kaiming-uniform start."""
    return 1.0 / math.sqrt(target.fan_in)


def attach_masks(
    model: nn.Module,
    targets: Sequence[MaskTarget],
    scores: Mapping[str, torch.Tensor],
    rule: Rule | Mapping[str, Rule],
    base: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Freezes the model and replaces every target with a `MaskedLinear` or `MaskedExperts`.

    Args:
        model: Modified in place; afterwards only scores are trainable.
        targets: From `find_targets` on this model.
        scores: One tensor per target name, of its weight's shape.
        rule: The rule from scores to mask, one for all targets or one per target name.
        base: For delta masks, the weight before fine-tuning of each target name, of the weight's shape, dtype and
            device; not copied. None if removed weights become 0.

    Raises:
        MaskingError: A soft mask is asked for between two models.
    """
    model.requires_grad_(False)
    experts: dict[str, list[MaskedPart]] = {}
    for target in targets:
        own = rule[target.name] if isinstance(rule, Mapping) else rule
        if isinstance(own, SoftRule) and base is not None:
            raise MaskingError(
                "A soft mask multiplies weights; it cannot return them to a model before fine-tuning.",
                key="mask",
                expected="a hard mask, or none before",
                actual="soft, with a model before fine-tuning",
                hint="mftctl interpolate finds the best share of the way between two models",
            )
        before = None if base is None else base[target.name]
        if isinstance(target.module, nn.Linear | Conv1D):
            _replace(model, target.module_name, MaskedLinear(target.module, scores[target.name], own, before))
        else:
            experts.setdefault(target.module_name, []).append(MaskedPart(target, scores[target.name], own, before))
    for name, parts in experts.items():
        _replace(model, name, MaskedExperts(model.get_submodule(name), parts))


def detach_masks(model: nn.Module) -> None:
    """Restores the original modules; their weights were never modified."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLinear | MaskedExperts):
            _replace(model, name, module.original())


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLinear | MaskedPart]]:
    """Yields the target name and module of everything that has scores, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            yield name, module
        elif isinstance(module, MaskedPart):
            yield module.target.name, module


def share_weights(model: nn.Module) -> None:
    """Disables cached masked weights, for a model sharded across processes.

    Args:
        model: A model with masks attached.

    Raises:
        TrainingError: Fused experts are masked.
    """
    for name, module in model.named_modules():
        if isinstance(module, MaskedExperts):
            raise TrainingError(
                "Fused experts cannot be masked while their weights are sharded across processes.",
                key=name,
                expected="whole weights in each process",
                actual=type(module.experts).__name__,
                hint="recipes/accelerate/zero2.yaml or ddp.yaml, or --target attn",
            )
    keep_no_products(model)


def keep_no_products(model: nn.Module) -> None:
    """Recomputes masked weights in each forward and backward pass; those of fused experts are still cached.

    Args:
        model: A model with masks attached.
    """
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module.keeps_product, module._masked_weight = False, torch.empty(0)


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Context in which a masked model computes as if it had no masks; not for computing gradients.

    Args:
        model: A model with masks attached, none of them on fused experts.
    """
    layers = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    try:
        for layer in layers:
            layer.passes_all = True
        yield
    finally:
        for layer in layers:
            layer.passes_all = False


def masked_products(model: nn.Module) -> list[torch.Tensor]:
    """The cached weights that a masked model computes with in place of its own, for the current scores."""
    products = []
    for module in model.modules():
        if isinstance(module, MaskedLinear) and module.keeps_product:
            products.append(module.masked_weight())
        elif isinstance(module, MaskedExperts):
            products += module.products()
    return products


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
