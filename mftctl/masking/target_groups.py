"""Groups of projections that share a mask: those of some decoder layers, or of one kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from mftctl.masking.targets import MaskTarget, Target, find_targets, format_layers


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """A group of projections.

    Attributes:
        layers: Indices of their decoder layers, ascending.
        projection: The kind of projection, such as `q_proj`; None for all that are masked in these layers.
    """

    layers: tuple[int, ...]
    projection: str | None = None

    @property
    def name(self) -> str:
        """The kind of projection, or the layers, such as `4-7`."""
        return self.projection or format_layers(self.layers)

    def has(self, target: MaskTarget) -> bool:
        """True if a projection of these layers belongs to the group."""
        return target.layer in self.layers and self.projection in (None, target.projection)

    def projections(self, masked: Collection[str] | None) -> Collection[str] | None:
        """The group's part of the masked projections, in the form that `find_targets` takes."""
        return masked if self.projection is None else (self.projection,)


def groups_by_projection(
    model: nn.Module,
    layers: Sequence[int],
    target: Target = "both",
    projections: Collection[str] | None = None,
) -> list[TargetGroup]:
    """One group for each kind of projection, in model order, with those of the given layers that have it.

    Args:
        model: A decoder-only model.
        layers: Indices of decoder layers.
        target: `attn`, `mlp` or `both`.
        projections: Only these kinds; None selects all.

    Raises:
        MaskingError: As for `find_targets`.

    Source: MFT, section 3.2, masking ratio ablation, which proposes to tell "types of linear mappings" apart.
    """
    return projection_groups(find_targets(model, layers, target, projections))


def projection_groups(targets: Sequence[MaskTarget]) -> list[TargetGroup]:
    """One group for each kind of projection among some targets, in their order."""
    found: dict[str, dict[int, None]] = {}
    for target in targets:
        found.setdefault(target.projection, {})[target.layer] = None
    return [TargetGroup(tuple(sorted(layers)), projection) for projection, layers in found.items()]


def largest_kind(targets: Sequence[MaskTarget]) -> list[MaskTarget]:
    """The targets of the kind of projection with the most weights; the first of several."""
    sizes: dict[str, int] = {}
    for target in targets:
        sizes[target.projection] = sizes.get(target.projection, 0) + target.weight.numel()
    return [target for target in targets if target.projection == max(sizes, key=sizes.__getitem__)]
