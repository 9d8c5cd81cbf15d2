"""Where masks remove, and how far they agree: the numbers, from the masks alone."""

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
"""Numbers in the cells of a larger table cannot be read."""

_EVEN: Final = 0.01
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.")
_KNOWN_ORDER: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class LayerShares:
    """The share that the masks of one group remove of each projection of each layer.

    Attributes:
        label: The group's.
        runs: The names of the masks' runs.
        seeds: Their seeds.
        removed_share: Of all masked weights, 0 to 1, averaged over the masks.
        projections: Names of the rows, in the order of the forward pass where it is known.
        layers: The columns, without a gap.
        shares: 0 to 1, rows of columns, averaged over the masks that cover the tensor; None where none does. Experts of
            one layer count as one.
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
        """Whether there is a share in every cell."""
        return all(share is not None for row in self.shares for share in row)

    @property
    def is_even(self) -> bool:
        """Whether the same is removed everywhere, but for rounding to whole weights."""
        known = [share for row in self.shares for share in row if share is not None]
        return max(known) - min(known) <= _EVEN * max(known)


@dataclass(frozen=True, slots=True)
class PairOverlap:
    """How far two masks agree over the tensors that both cover.

    Attributes:
        first: Place of one of them in the list of masks.
        second: Place of the other, a higher one.
        weights: The weights that both cover.
        jaccard: Removed by both over removed by either, 0 to 1.
        by_chance: What two random masks that remove as many weights of each tensor give.
    """

    first: int
    second: int
    weights: int
    jaccard: float
    by_chance: float


@dataclass(frozen=True, slots=True)
class MaskOverlaps:
    """How far masks agree, two by two.

    Attributes:
        labels: A name for each mask: its group's, and the seed where the group has several.
        runs: The names of their runs.
        pairs: Those that have a tensor in common.
        left_out: How many masks of the groups are not in it.
    """

    labels: tuple[str, ...]
    runs: tuple[str, ...]
    pairs: tuple[PairOverlap, ...]
    left_out: int


def layer_shares(groups: Sequence[MaskGroup]) -> list[LayerShares]:
    """The share removed by layer and projection; all with the same rows and columns, so that they line up.

    Tensors outside the layers, and those of one dimension, are left out.
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
    """How far the masks of these groups agree; of many, one seed after the other of all groups.

    Raises:
        MaskFileError: A mask file changed since it was read.
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
    """The share removed by path without numbers, and layer."""
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
    """Attention before the rest, and in either the order of the forward pass where it is known."""
    is_attention = any("attn" in part or "attention" in part for part in path)
    place = _KNOWN_ORDER.index(path[-1]) if path[-1] in _KNOWN_ORDER else len(_KNOWN_ORDER)
    return not is_attention, place, len(path), path


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ending of each path that no other has, such as `q`, or `mlp.c_proj` beside `attn.c_proj`."""
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
