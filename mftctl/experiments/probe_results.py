"""Results of `probe` as stored in `run.json` and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field

from mftctl.experiments.results import PrefixReuse, Result, Score
from mftctl.experiments.value_types import Count, Measured, Name, Part, Several

Kind = Annotated[str | None, Field(default=None, exclude_if=lambda value: value is None)]


class Group(Part):
    """Group of projections ranked by a probe: those of some layers, or of one kind.

    Attributes:
        layers: Layers of the group, such as `4-7`.
        projection: Kind of projection, such as `q_proj`; None for all that are masked.
        size: Number of layers.
        weights: Number of weights that carry the mask; None for a group of layers.
        change: Change of the validation loss with the group's mask; for `probe --fast`, the predicted change.
    """

    layers: str
    projection: Kind
    size: Several
    weights: Annotated[Count | None, Field(default=None, exclude_if=lambda value: value is None)]
    change: Measured

    @property
    def name(self) -> str:
        """Kind of projection, or the layers."""
        return self.projection or self.layers


def group_text(name: str) -> str:
    """Returns the name of a probe's group with what it is a name of: `layers 4-7`, but `q_proj`."""
    return f"layers {name}" if name[:1].isdigit() else name


class TrainedGroup(Group):
    """Group whose mask was trained.

    Attributes:
        start_loss: Validation loss with the mask of the initial scores.
        best_loss: Lowest validation loss.
        best_step: Step with the lowest validation loss.
        steps: Number of optimizer steps.
        score: Score with the best mask; None, like all below, if groups are ranked by loss.
        score_standard_error: Standard error of the score, if known.
        score_change: Change of the score relative to the unmasked model.
        score_rank: Value to rank groups by; lower is better.
    """

    start_loss: Measured
    best_loss: Measured
    best_step: Count
    steps: Count
    score: Measured | None = None
    score_standard_error: Measured | None = None
    score_change: Measured | None = None
    score_rank: Measured | None = None


class Agreement(Part):
    """Agreement between `probe --fast` and a trained probe.

    Attributes:
        run: Run name of the trained probe.
        groups: Number of groups in both.
        rank_correlation: Spearman's rank correlation over these groups.
    """

    run: str
    groups: Count
    rank_correlation: Measured


class Recommended(Result):
    """What a probe recommends to mask.

    Attributes:
        recommended_layers: The layers.
        recommended_projection: Kind of projection; None for all.
    """

    recommended_layers: str
    recommended_projection: Kind


class ProbeResult(Result):
    """Result of `probe`: a `TrainedProbe` or a `FastProbe`, which rank groups, or a `StructureProbe`."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Returns the result stored in a record, as the subclass it belongs to.

        Raises:
            pydantic.ValidationError: A value is missing, out of bounds or of the wrong type.
        """
        if cls is GroupProbe or (cls is ProbeResult and "unit" not in document):
            return cast("Self", (FastProbe if document.get("fast") else TrainedProbe).read(document))
        return cast("Self", StructureProbe.read(document)) if cls is ProbeResult else super().read(document)


class GroupProbe(ProbeResult, Recommended):
    """Result of a probe that ranks groups.

    Attributes:
        groups: The groups, best first.
    """

    groups: Sequence[Group]

    @property
    def recommended(self) -> str:
        """Name of the recommended group."""
        return self.recommended_projection or self.recommended_layers


class TrainedProbe(GroupProbe):
    """Result of a probe that trained a mask for each group.

    Attributes:
        groups: The groups, best first.
        by: Ranking criterion: `loss`, `exact_match` or a benchmark.
        unmasked_loss: Validation loss without a mask.
        unmasked_score: Score without a mask; None if groups are ranked by loss.
        prefix_reuse: Use of the cache of hidden states.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    groups: list[TrainedGroup]
    by: str = "loss"
    unmasked_loss: Measured
    unmasked_score: Score | None = Field(default=None, exclude_if=lambda value: value is None)
    prefix_reuse: PrefixReuse | None = None
    peak_memory_bytes: Count | None = None


class FastProbe(GroupProbe):
    """Result of `probe --fast`, which trains nothing.

    Attributes:
        fast: Always True.
        groups: The groups, best first; groups of layers among those of the same size.
        agreement: Agreement with the latest trained probe of the same model; None if there is none.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    fast: Literal[True]
    groups: list[Group]
    agreement: Agreement | None
    peak_memory_bytes: Count | None = None


class HeadOrNeuron(Part):
    """An attention head or MLP neuron.

    Attributes:
        layer: Index of its decoder layer.
        index: Its index in the layer.
        change: Predicted change of the training loss with a mask of its weights.
    """

    layer: Count
    index: Count
    change: Measured


class LayerOfUnits(Part):
    """The attention heads or MLP neurons of a layer.

    Attributes:
        layer: Index of the decoder layer.
        units: Number of heads or neurons.
        change: Sum of their predicted changes.
        best: Number of them among the best 10 % of all layers.
        best_share: Share of the predicted change of all layers that these have.
    """

    layer: Count
    units: Several
    change: Measured
    best: Count
    best_share: Measured


class StructureProbe(ProbeResult):
    """Result of `probe --fast --unit head` or `--unit neuron`.

    Attributes:
        fast: Always True.
        unit: `head` or `neuron`.
        file: Name of the file in the run folder with the predicted change of each.
        units: Number of heads or neurons.
        change: Sum of their predicted changes.
        best_units: Number of those that make up the best 10 %.
        best_share: Share of `change` that these have.
        layers: Summary of each layer.
        best: The best ones, with the lowest change first.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    fast: Literal[True]
    unit: Literal["head", "neuron"]
    file: Name
    units: Several
    change: Measured
    best_units: Several
    best_share: Measured
    layers: list[LayerOfUnits]
    best: list[HeadOrNeuron]
    peak_memory_bytes: Count | None = None
