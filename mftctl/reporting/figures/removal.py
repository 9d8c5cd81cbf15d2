"""Figures of what masks remove: where, of which magnitude, and how far masks agree."""

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


def removal_figures(runs: Sequence[Run], problems: list[str]) -> list[Figure]:
    """Up to three figures for each kind of mask and shape of model; none without a finished `mask-train` run.

    `removed-by-layer`, unless the same is removed everywhere; `removed-by-magnitude`, where a model is still on disk;
    and `mask-overlap`, where two masks have a tensor in common. Those of the second family of masks end in `-2`. None
    of the papers has such figures.

    At most one tensor of a model and its bits in the masks compared are in memory; the weights are not copied.

    Args:
        runs: Oldest first.
        problems: Gets a line for each mask or model that cannot be used, and why.
    """
    families = mask_families(runs, problems)
    figures = []
    for number, family in enumerate(families):
        several = len({family.origin for family in families}) > 1
        about = f" ({Path(family.origin).name})" if several else ""
        names = _Names(family, about, f"-{number + 1}" if number else "")
        layers = layer_shares(family.groups)
        if not all(group.is_even and group.covers_all for group in layers):
            figures.append(_layer_figure(layers, names))
        if magnitudes := magnitude_shares(family.groups, problems):
            figures.append(_magnitude_figure(magnitudes, names))
        try:
            overlaps = mask_overlaps(family.groups)
        except MaskFileError as error:
            problems.append(f"{error.path}: {error.message}")
            continue
        if overlaps.pairs:
            figures.append(_overlap_figure(overlaps, names))
    return figures


@dataclass(frozen=True, slots=True)
class _Names:
    """What the figures of one family have in common, beside the model where there are several: words for its masks."""

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
        return "put back to their values before fine-tuning" if self.resets else "removed"

    def basis(self, runs: Iterable[Sequence[str]]) -> str:
        """What a figure was made from, and which masks are left out; a space before it."""
        count = len(_unique(runs))
        text = f" From {count} mask{'s' * (count > 1)}."
        if self.family.older:
            text += f" Of masks made in the same way with the same seed only the newest: {self.family.older} left out."
        if self.family.more:
            text += f" {self.family.more} other ways to make masks, with fewer seeds or older, are left out."
        return text


def _layer_figure(groups: Sequence[LayerShares], names: _Names) -> Figure:
    columns = layer_columns(groups)
    rows = -(-len(groups) // columns)
    scale = "Each panel has its own scale" if shared_top(groups) is None else "All on one scale"
    caption = (
        f"Share of the weights {names.removed} by the mask, by layer and projection"
        f"{_of_seeds([group.seeds for group in groups])}. {scale}, from 0. Hatched: not masked. Above each panel:"
        " the share of all masked weights. A mask that takes its ratio of every tensor has one colour by design."
        + (" Embeddings and norms are not shown." if names.resets else "")
        + " It does not tell which of these weights matter."
        + names.basis([group.runs for group in groups])
    )
    return Figure(
        name=f"removed-by-layer{names.ending}",
        title=f"Where {'drops reset' if names.resets else 'masks remove'} weights{names.about}",
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
        f"Share of the weights {names.removed}, by rank of |w| within each tensor in {BINS} equal parts, the smallest"
        f" first{_of_seeds([group.seeds for group in groups], band=True)}. Dotted: what a random"
        " mask gives, the share above each panel. Each panel has its own scale, from 0."
        + (f" Of larger tensors {MAX_SAMPLE:,} weights were drawn." if sampled else "")
        + (" |w| is that of the fine-tuned model." if names.resets else "")
        + " A mask that takes small weights need not have looked at their size."
        + names.basis([group.runs for group in groups])
    )
    return Figure(
        name=f"removed-by-magnitude{names.ending}",
        title=f"Do {'drops reset' if names.resets else 'masks remove'} small or large weights?{names.about}",
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
        f"Below the diagonal: weights {names.removed} by both masks over those by either (Jaccard), in tensors that"
        " both cover. Above: the same for random masks that take as many of each tensor. Empty: no tensor in common."
        " More than chance says that two masks agree, not that they do for a good reason: masks that take the smallest"
        " weights agree too."
        + (f" {overlaps.left_out} masks of further seeds are left out." if overlaps.left_out else "")
        + names.basis([overlaps.runs])
    )
    return Figure(
        name=f"mask-overlap{names.ending}",
        title=f"How far {'drops' if names.resets else 'masks'} agree{names.about}",
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
    """What is said of an average, if there is one."""
    if max(map(len, seeds)) == 1:
        return ""
    return ", averaged over seeds" + (" (band: lowest to highest)" if band else "")


def _unique(runs: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in runs for name in names))
