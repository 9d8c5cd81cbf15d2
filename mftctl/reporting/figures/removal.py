"""Figures of the weights that masks remove: location, magnitude, and overlap between masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mftctl.errors import MaskFileError
from mftctl.experiments.run_folder import Run
from mftctl.reporting.figures.mask_groups import MaskFamily, mask_families
from mftctl.reporting.figures.removal_drawing import (
    draw_layer_shares,
    draw_magnitude_shares,
    draw_overlaps,
    layer_columns,
    magnitude_columns,
    shared_top,
)
from mftctl.reporting.figures.removal_magnitudes import BINS, MAX_SAMPLE, MagnitudeShares, magnitude_shares
from mftctl.reporting.figures.removal_measures import LayerShares, MaskOverlaps, layer_shares, mask_overlaps
from mftctl.reporting.figures.style import Figure
from mftctl.text import counted


def removal_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """Up to three figures per kind of mask and shape of model; none without a finished `mask-train` run.

    The figures are `removed-by-layer`, unless the share is the same everywhere; `removed-by-magnitude`, if a model is
    still on disk; and `mask-overlap`, if two masks share a tensor. Names for the second family of masks end in `-2`.
    The papers have no such figures.

    At most one tensor of a model and its mask bits are in memory at a time; the weights are not copied.

    Args:
        runs: The runs, oldest first.

    Returns:
        The figures, and one line, with the reason, per mask or model that cannot be used.
    """
    families, problems = mask_families(runs)
    figures = []
    for number, family in enumerate(families):
        several = len({family.origin for family in families}) > 1
        about = f" ({Path(family.origin).name})" if several else ""
        names = _Names(family, about, f"-{number + 1}" if number else "")
        layers = layer_shares(family.groups)
        if not all(group.is_even and group.covers_all for group in layers):
            figures.append(_layer_figure(layers, names))
        magnitudes, unmeasured = magnitude_shares(family.groups)
        problems += unmeasured
        if magnitudes:
            figures.append(_magnitude_figure(magnitudes, names))
        try:
            overlaps = mask_overlaps(family.groups)
        except MaskFileError as error:
            problems.append(f"{error.path}: {error.message}")
            continue
        if overlaps.pairs:
            figures.append(_overlap_figure(overlaps, names))
    return figures, problems


@dataclass(frozen=True, slots=True)
class _Names:
    """Wording shared by the figures of one mask family."""

    family: MaskFamily
    about: str
    ending: str

    @property
    def resets(self) -> bool:
        return self.family.kind == "delta"

    @property
    def done(self) -> str:
        return "reset" if self.resets else "removed"

    @property
    def removed(self) -> str:
        return "reset to their values before fine-tuning" if self.resets else "removed"

    def basis(self, runs: Iterable[Sequence[str]]) -> str:
        """Caption sentences about the masks used and left out, with a leading space."""
        text = f" From {counted(len(_unique(runs)), 'mask')}."
        if self.family.older:
            text += f" Older masks with the same settings and seed left out: {self.family.older}."
        if self.family.more:
            text += f" Other groups of masks left out (fewer seeds or older): {self.family.more}."
        return text


def _layer_figure(groups: Sequence[LayerShares], names: _Names) -> Figure:
    columns = layer_columns(groups)
    rows = -(-len(groups) // columns)
    scale = "Each panel has its own scale" if shared_top(groups) is None else "All on one scale"
    caption = (
        f"Share of weights {names.removed} by the mask, by layer and projection"
        f"{_of_seeds([group.seeds for group in groups])}. {scale}, from 0. Hatched: not masked. Above each panel:"
        " the share of all masked weights. A mask that applies its ratio to every tensor has one colour by design."
        + (" Embeddings and norms are not shown." if names.resets else "")
        + " The figure does not show which of these weights matter."
        + names.basis([group.runs for group in groups])
    )
    return Figure(
        name=f"removed-by-layer{names.ending}",
        title=f"Weights {'reset' if names.resets else 'removed'} by masks, by layer{names.about}",
        caption=caption,
        data=tuple(
            {
                "mask": group.label,
                "seeds": list(group.seeds),
                "layer": layer,
                "projection": projection,
                "removed_share": share,
            }
            for group in groups
            for projection, line in zip(group.projections, group.shares, strict=True)
            for layer, share in zip(group.layers, line, strict=True)
            if share is not None
        ),
        runs=_unique(group.runs for group in groups),
        draw=partial(draw_layer_shares, groups=groups),
        height_inches=0.3 + rows * (0.75 + 0.16 * len(groups[0].projections)),
    )


def _magnitude_figure(groups: Sequence[MagnitudeShares], names: _Names) -> Figure:
    rows = -(-len(groups) // magnitude_columns(groups))
    sampled = any(group.is_sampled for group in groups)
    caption = (
        f"Share of weights {names.removed}, by rank of |w| within each tensor in {BINS} equal bins, smallest first"
        f"{_of_seeds([group.seeds for group in groups], band=True)}. Dotted: a random mask, which removes the"
        " share above each panel from every bin. Each panel has its own scale, from 0."
        + (f" Larger tensors were sampled ({MAX_SAMPLE:,} weights each)." if sampled else "")
        + (" |w| is taken from the fine-tuned model." if names.resets else "")
        + " A mask that removes small weights was not necessarily chosen by magnitude."
        + names.basis([group.runs for group in groups])
    )
    return Figure(
        name=f"removed-by-magnitude{names.ending}",
        title=f"Weights {'reset' if names.resets else 'removed'} by masks, by magnitude{names.about}",
        caption=caption,
        data=tuple(
            {
                "mask": group.label,
                "seeds": list(group.seeds),
                "from_rank": place / BINS,
                "to_rank": (place + 1) / BINS,
                "removed_share": group.shares[place],
                "lowest": group.lowest[place],
                "highest": group.highest[place],
                "by_chance": group.flat,
            }
            for group in groups
            for place in range(BINS)
        ),
        runs=_unique(group.runs for group in groups),
        draw=partial(draw_magnitude_shares, groups=groups, done=names.done),
        height_inches=3.0 if rows == 1 else 0.4 + 1.75 * rows,
    )


def _overlap_figure(overlaps: MaskOverlaps, names: _Names) -> Figure:
    caption = (
        f"Below the diagonal: weights {names.removed} by both masks over those by either (Jaccard index), in tensors"
        " that both cover. Above: the same for random masks that remove as many weights from each tensor. Empty: no"
        " tensor in common. Overlap above chance shows that two masks agree, not that they agree for a good reason:"
        " masks that remove the smallest weights also agree."
        + (f" Masks of further seeds left out: {overlaps.left_out}." if overlaps.left_out else "")
        + names.basis([overlaps.runs])
    )
    return Figure(
        name=f"mask-overlap{names.ending}",
        title=f"Overlap between {'delta masks' if names.resets else 'masks'}{names.about}",
        caption=caption,
        data=tuple(
            {
                "first": overlaps.labels[pair.first],
                "first_run": overlaps.runs[pair.first],
                "second": overlaps.labels[pair.second],
                "second_run": overlaps.runs[pair.second],
                "weights": pair.weights,
                "jaccard": pair.jaccard,
                "by_chance": pair.by_chance,
            }
            for pair in overlaps.pairs
        ),
        runs=overlaps.runs,
        draw=partial(draw_overlaps, overlaps=overlaps, done=names.done),
        height_inches=0.9 + 0.33 * len(overlaps.labels),
    )


def _of_seeds(seeds: Sequence[Sequence[int]], *, band: bool = False) -> str:
    """Caption words about averaging; empty for single seeds."""
    if max(map(len, seeds)) == 1:
        return ""
    return ", averaged over seeds" + (" (band: lowest to highest)" if band else "")


def _unique(runs: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in runs for name in names))
