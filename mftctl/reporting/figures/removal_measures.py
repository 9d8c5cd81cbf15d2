"""Shares removed by layer and overlap between masks, computed from the masks alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Final

from mftctl.reporting.figures.mask_groups import MaskGroup, ShownMask

if TYPE_CHECKING:
    from mftctl.masking.mask_file.document import TensorRecord

MAX_MASKS: Final = 12
"""Numbers in the cells of a larger table are unreadable."""

_EVEN: Final = 0.01
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.(?!weight$)")
"""The number of a layer; not that of a module in a sequence, such as in `visual.merger.mlp.0.weight`."""
_KNOWN_ORDER: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class LayerShares:
    """The share of weights removed by the masks of one group, by layer and projection.

    Attributes:
        label: Label of the group.
        runs: Names of the masks' runs.
        seeds: Seeds of the masks.
        removed_share: Share of all masked weights, 0 to 1, averaged over the masks.
        projections: Row names, in the order of the forward pass if it is known.
        layers: Layer numbers of the columns, without gaps.
        shares: Rows of shares, 0 to 1, averaged over the masks that cover the tensor; None if none does. The experts
            of a layer are combined.
    """

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    removed_share: float
    projections: tuple[str, ...]
    layers: tuple[int, ...]
    shares: tuple[tuple[float | None, ...], ...]

    @property
    def covers_all(self) -> bool:
        """True if every cell has a share."""
        return all(share is not None for row in self.shares for share in row)

    @property
    def is_even(self) -> bool:
        """True if the share is the same everywhere, apart from rounding to whole weights."""
        known = [share for row in self.shares for share in row if share is not None]
        return max(known) - min(known) <= _EVEN * max(known)


@dataclass(frozen=True, slots=True)
class PairOverlap:
    """Overlap of two masks over the tensors that both cover.

    Attributes:
        first: Index of the first mask in the list of masks.
        second: Index of the second mask, greater than `first`.
        weights: Number of weights that both cover.
        jaccard: Weights removed by both over weights removed by either, 0 to 1.
        by_chance: The value expected of two random masks that remove as many weights from each tensor.
    """

    first: int
    second: int
    weights: int
    jaccard: float
    by_chance: float


@dataclass(frozen=True, slots=True)
class MaskOverlaps:
    """Pairwise overlaps of masks.

    Attributes:
        labels: Label of each mask: that of its group, with the seed if the group has several.
        runs: Names of the masks' runs.
        pairs: Pairs of masks with a tensor in common.
        left_out: Number of masks left out.
    """

    labels: tuple[str, ...]
    runs: tuple[str, ...]
    pairs: tuple[PairOverlap, ...]
    left_out: int


def layer_shares(groups: Sequence[MaskGroup]) -> list[LayerShares]:
    """The share removed by layer and projection; all groups have the same rows and columns so that they line up.

    Tensors outside the layers and one-dimensional tensors are left out.
    """
    cells = [[_cells(mask.records) for mask in group.masks] for group in groups]
    keys = {key for group in cells for mask in group for key in mask}
    paths = sorted({path for path, _ in keys}, key=_row_order)
    layers = [layer for _, layer in keys]
    columns = tuple(range(min(layers, default=0), max(layers, default=-1) + 1))
    names = tuple(_short_names(paths))
    return [
        LayerShares(
            label=group.label,
            runs=group.runs,
            seeds=group.seeds,
            removed_share=fmean(mask.removed_share for mask in group.masks),
            projections=names,
            layers=columns,
            shares=tuple(
                tuple(_mean(mask.get((path, layer)) for mask in masks) for layer in columns) for path in paths
            ),
        )
        for group, masks in zip(groups, cells, strict=True)
        if any(masks)
    ]


def mask_overlaps(groups: Sequence[MaskGroup]) -> MaskOverlaps:
    """Pairwise overlaps of the groups' masks; if there are too many, the first seeds of every group come first.

    Raises:
        MaskFileError: A mask file has changed since it was read.
    """
    from mftctl.masking.mask import open_mask
    from mftctl.masking.overlap import pairwise_overlaps

    turns = max(len(group.masks) for group in groups)
    in_turn = [(place, turn) for turn in range(turns) for place, group in enumerate(groups) if turn < len(group.masks)]
    chosen: list[tuple[MaskGroup, ShownMask]] = [
        (groups[place], groups[place].masks[turn]) for place, turn in sorted(in_turn[:MAX_MASKS])
    ]
    with ExitStack() as stack:
        found = pairwise_overlaps([stack.enter_context(open_mask(mask.path)) for _, mask in chosen])
    return MaskOverlaps(
        labels=tuple(
            group.label if len(group.masks) == 1 else f"{group.label}, seed {mask.seed}" for group, mask in chosen
        ),
        runs=tuple(mask.run.name for _, mask in chosen),
        pairs=tuple(
            PairOverlap(first, second, overlap.weights, overlap.jaccard, overlap.expected_jaccard)
            for (first, second), overlap in found.items()
        ),
        left_out=len(in_turn) - len(chosen),
    )


def _cells(records: Mapping[str, TensorRecord]) -> dict[tuple[tuple[str, ...], int], float]:
    """The share removed by layer and by tensor path without numbers."""
    removed: dict[tuple[tuple[str, ...], int], int] = {}
    weights: dict[tuple[tuple[str, ...], int], int] = {}
    for name, record in records.items():
        layer = _LAYER.search(name)
        if layer is None or len(record.shape) == 1:
            continue
        path = tuple(part for part in name.removesuffix(".weight").split(".") if not part.isdecimal())
        key = path, int(layer[1])
        removed[key] = removed.get(key, 0) + record.removed
        weights[key] = weights.get(key, 0) + record.weights
    return {key: removed[key] / weights[key] for key in weights}


def _row_order(path: tuple[str, ...]) -> tuple[bool, int, int, tuple[str, ...]]:
    """Sort key: attention first, then the order of the forward pass if it is known."""
    is_attention = any("attn" in part or "attention" in part for part in path)
    place = _KNOWN_ORDER.index(path[-1]) if path[-1] in _KNOWN_ORDER else len(_KNOWN_ORDER)
    return not is_attention, place, len(path), path


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest unique suffix of each path, such as `q`, or `mlp.c_proj` if there is also `attn.c_proj`."""
    names = []
    for path in paths:
        lengths = range(1, len(path) + 1)
        length = next(
            (length for length in lengths if [other[-length:] for other in paths].count(path[-length:]) == 1), len(path)
        )
        name = ".".join(path[-length:])
        names.append(name if path[-1] == "c_proj" else name.removesuffix("_proj"))
    return names


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
