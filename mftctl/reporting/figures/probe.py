"""Probe figures: the measured or predicted effect of masking each group of projections on the loss or a score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mftctl.errors import RunError
from mftctl.experiments.probe_results import (
    FastProbe,
    ProbeResult,
    StructureProbe,
    TrainedProbe,
    group_text,
)
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import PRE_TRAINED
from mftctl.reporting.figures.curve_drawing import STAR
from mftctl.reporting.figures.probe_groups import (
    ProbedGroup,
    ProbedModel,
    combined_probe,
    comparable_probes,
    is_of_kinds,
    probe_result,
    probed_model,
    seed_of,
    shared_settings,
    unmasked_score,
)
from mftctl.reporting.figures.style import (
    INK,
    Figure,
    drawn_text,
    legend_height_inches,
    numbered_style,
    put_legend,
    with_own_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


def probe_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """Validation loss or score by group for trained probes, and separately the predictions of `probe --fast`.

    Probes of the same model with the same settings and ranking metric share a figure, whatever their seeds and group
    sizes. Those of heads and neurons have their own (`heads_and_neurons`).

    Args:
        runs: The runs, oldest first.

    Returns:
        The figures, and one line per run that cannot be used.

    Source: MFT, figures 3 and 7.
    """
    usable, problems = [], []
    for run in runs:
        if run.record.command != "probe" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            if isinstance(run.result(ProbeResult), StructureProbe):
                continue
            _ = _figure(combined_probe([run])), probed_model(run), _settings(run)
        except (RunError, KeyError, ValueError, TypeError, AttributeError) as error:
            problems.append(told(error, f"{run.folder / 'run.json'}: the result of this probe cannot be read"))
            continue
        usable.append(run)
    probes = [combined_probe(group) for group in comparable_probes(usable, _settings)]
    drawn = [probe for probe in probes if sum(map(len, probe.sizes.values())) > 1]
    return with_own_names(_figure(probe) for probe in sorted(drawn, key=lambda probe: probe.is_fast)), problems


def _settings(run: Run) -> str:
    """The settings that all probes in one figure share."""
    result = probe_result(run)
    score = unmasked_score(result)
    kinds = ["projection"] if is_of_kinds(result) else []
    by = [] if score is None or not isinstance(result, TrainedProbe) else [result.by, score.metric, score.samples]
    return shared_settings(run, isinstance(result, FastProbe), *by, *kinds)


def _figure(probe: ProbedModel) -> Figure:
    ranked_by = probe.ranked_by[0].upper() + probe.ranked_by[1:] if probe.score is None else probe.ranked_by
    groups_text = "kind of projection" if probe.of_kinds else "group of layers"
    return Figure(
        name=f"probe{'-promised' if probe.is_fast else ''}{'-projections' if probe.of_kinds else ''}",
        title=f"Predicted loss change by {groups_text}" if probe.is_fast else f"{ranked_by} by {groups_text}",
        caption=" ".join(_captions(probe)),
        data=tuple(
            {
                "projection" if probe.of_kinds else "layers": group.name,
                "groups": name,
                "change": group.change,
                "lowest": min(group.changes),
                "highest": max(group.changes),
                "seeds": len(group.changes),
                **_values_without_mask(probe),
                **({"loss_change": fmean(group.loss_changes)} if group.loss_changes else {}),
                "recommended": group.name == probe.recommended,
            }
            for name, groups in probe.sizes.items()
            for group in groups
        ),
        runs=tuple(run.name for run in probe.runs),
        draw=partial(_draw, probe),
        height_inches=3.2 + legend_height_inches(["FFT, no mask", *probe.sizes, "recommended"]),
    )


def _captions(probe: ProbedModel) -> list[str]:
    first = probe.runs[0].record
    share = first.config["probe"].get("data_fraction", 1.0)
    origin = Origin.read(first.inputs).origin
    captions = [f"{origin}, {probe.unmasked_state}: masks based on {share:.0%} of the training data."]
    if probe.is_fast:
        captions.append(
            "Nothing was trained: first-order predictions from one pass of gradients. They rank groups of one size; "
            f"the predicted change is far too optimistic and always grows with the number of "
            f"{'weights' if probe.of_kinds else 'layers'}."
        )
        captions += _agreement(probe.runs)
    elif probe.score is not None:
        error = probe.score.standard_error
        within = "" if error is None else f", standard error of one score {error:.4f}"
        captions.append(
            f"Each group's mask with the lowest validation loss, scored on {probe.score.samples} samples{within}."
        )
    else:
        captions.append("Each group's mask was chosen on these validation records, so the best result is partly luck.")
    votes = sum(probe_result(run).recommended == probe.recommended for run in probe.runs)
    captions.append(
        f"Star: {group_text(probe.recommended)} ({probe.best.change:+.4f}), recommended by {votes} of "
        f"{len(probe.runs)} probes."
    )
    seeds = len({seed_of(run) for run in probe.runs})
    captions.append(
        f"Mean over {seeds} seeds; bars span the lowest to the highest change." if seeds > 1 else "One seed."
    )
    return captions


def _values_without_mask(probe: ProbedModel) -> dict[str, Any]:
    """The unmasked model's values for the figure's data."""
    if probe.score is None:
        return {"unmasked_loss": None if probe.is_fast else probe.unmasked}
    results = [probe_result(run) for run in probe.runs]
    losses = [result.unmasked_loss for result in results if isinstance(result, TrainedProbe)]
    return {"score": probe.ranked_by, "unmasked_score": probe.unmasked, "unmasked_loss": fmean(losses)}


def _agreement(runs: Sequence[Run]) -> list[str]:
    results = [probe_result(run) for run in runs]
    found = [result.agreement for result in results if isinstance(result, FastProbe) and result.agreement]
    if not found:
        return []
    values = ", ".join(f"{item.rank_correlation:.2f} ({item.run})" for item in found)
    return [f"Rank correlation with trained probes: {values}."]


def _draw(probe: ProbedModel, canvas: Canvas) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = canvas.subplots()
    base = probe.unmasked
    without = "without a mask" if probe.unmasked_state == PRE_TRAINED else f"{probe.unmasked_state}, no mask"
    axes.axhline(base, color=INK, linestyle=(0, (5, 2)), linewidth=1.2, label=drawn_text(without))
    for number, (name, groups) in enumerate(probe.sizes.items()):
        _draw_size(axes, name, groups, number, base)
    axes.plot(probe.best.middle, base + probe.best.change, label="recommended", **STAR)
    axes.set_ylabel("predicted change in loss" if probe.is_fast else probe.ranked_by)
    if probe.of_kinds:
        kinds = [group.name for groups in probe.sizes.values() for group in groups]
        axes.set_xlabel("masked projection")
        axes.set_xticks(range(len(kinds)), list(map(drawn_text, kinds)))
    else:
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    put_legend(canvas, dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))


def _draw_size(axes: Axes, name: str, groups: Sequence[ProbedGroup], number: int, base: float) -> None:
    """Draws each group as a bar spanning its layers, with a marker in the middle."""
    style = numbered_style(number)
    heights = [base + group.change for group in groups]
    line = {"linestyle": "none"} if groups[0].rank is not None else {}
    axes.plot([group.middle for group in groups], heights, label=name, **{**style.keywords(), **line})
    for group, height in zip(groups, heights, strict=True):
        for first, last in group.ranges:
            axes.plot([first - 0.4, last + 0.4], [height, height], color=style.color, linewidth=3.0, alpha=0.5)
        if len(group.changes) > 1:
            ends = [base + min(group.changes), base + max(group.changes)]
            axes.plot([group.middle] * 2, ends, color=style.color, linewidth=0.9, marker="_", markersize=4.0)
