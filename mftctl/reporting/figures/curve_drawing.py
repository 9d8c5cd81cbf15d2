"""Draws training curves: bands over seeds, a star at the best FFT, and an enlarged view of the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mftctl.reporting.figures.style import INK, Figure, drawn_text, legend_height_inches, put_legend, style_of
from mftctl.reporting.figures.training_histories import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_BAND_ALPHA = 0.18
_NARROW = 0.3
STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 12,
    "color": "#F0E442",
    "markeredgecolor": INK,
    "linestyle": "none",
    "zorder": 5,
}
"""Marker style for the best result of a figure: arguments for `Axes.plot`."""


@dataclass(frozen=True, slots=True)
class SeedCurve:
    """The curve of one run.

    Attributes:
        history: The run's history.
        values: Values by step since the pre-trained model.
    """

    history: History
    values: Mapping[int, float]

    @property
    def own(self) -> dict[int, float]:
        """The values by the run's own step."""
        return {step - self.history.first_step: value for step, value in self.values.items()}


@dataclass(frozen=True, slots=True)
class Curve:
    """One method in a figure.

    Attributes:
        label: Label in the legend.
        state: State that determines the style.
        seeds: One curve per seed.
        variants: Number of variants of this state, including this one.
    """

    label: str
    state: str
    seeds: tuple[SeedCurve, ...]
    variants: int

    @property
    def is_level(self) -> bool:
        """True if the method takes no steps and is drawn as a horizontal line."""
        return not self.seeds[0].history.is_trained

    @property
    def is_mask(self) -> bool:
        """True if the method removes weights instead of training them."""
        return self.seeds[0].history.run.record.command == "mask-train"


@dataclass(frozen=True, slots=True)
class CurvePicture:
    """The content of one figure.

    Attributes:
        name: File name.
        title: Title of the figure.
        y_label: Label of the y-axis.
        lines: All lines.
        star: Position of the best FFT, averaged over seeds; None if it was not measured.
        lower_is_better: Whether lower values are better.
        captions: Sentences for the caption.
    """

    name: str
    title: str
    y_label: str
    lines: tuple[Curve, ...]
    star: tuple[float, float] | None
    lower_is_better: bool
    captions: tuple[str, ...]


def curve_figure(picture: CurvePicture, origin: str) -> Figure:
    """Returns the figure for a picture.

    Args:
        picture: The content to draw.
        origin: The pre-trained model, for the caption.

    Source: MFT, figure 2.
    """
    top = _top(picture)
    captions = [f"Model: {origin}.", *picture.captions, *_about(picture), *_about_outside(picture, top)]
    return Figure(
        name=picture.name,
        title=picture.title,
        caption=" ".join(captions),
        data=tuple(_points(picture)),
        runs=tuple(dict.fromkeys(seed.history.run.name for line in picture.lines for seed in line.seeds)),
        draw=partial(_draw, picture, top),
        height_inches=3.4 + legend_height_inches([*(line.label for line in picture.lines), "best FFT"]),
    )


def _about(picture: CurvePicture) -> list[str]:
    """Caption sentences that explain the lines."""
    lines = picture.lines
    sentences = []
    if picture.star is not None:
        sentences.append("Star: the best FFT state, from which the others continue.")
    if any(line.is_level for line in lines):
        sentences.append("A horizontal line is a method that takes no steps.")
    if max(len(line.seeds) for line in lines) > 1:
        numbers = sorted({len(line.seeds) for line in lines})
        number = " to ".join(str(count) for count in dict.fromkeys((numbers[0], numbers[-1])))
        sentences.append(f"Mean over {number} seeds; bands span lowest to highest; thin lines are single seeds.")
    else:
        sentences.append("One seed each, so the variation between seeds is unknown.")
    chosen = [f"{line.label} of {line.variants}" for line in lines if line.variants > 1]
    if chosen:
        sentences.append(f"Of several variants, the one with the most seeds, then the best loss: {', '.join(chosen)}.")
    unfinished = [seed.history.run.name for line in lines for seed in line.seeds if not seed.history.is_finished]
    if unfinished:
        sentences.append(f"Not finished: {', '.join(unfinished)}.")
    return sentences


def _about_outside(picture: CurvePicture, top: float | None) -> list[str]:
    """Caption sentence about values above the plotted range, naming lines that lie entirely outside it."""
    values = [(line, value) for line in picture.lines for seed in line.seeds for value in seed.values.values()]
    if top is None or all(value <= top for _, value in values):
        return []
    inside = {line.label for line, value in values if value <= top}
    outside = [line.label for line in picture.lines if line.label not in inside]
    return ["Much worse values are cut off at the top" + (f", all of {', '.join(outside)}." if outside else ".")]


def _points(picture: CurvePicture) -> list[dict[str, Any]]:
    return [
        {
            "state": line.label,
            "run": seed.history.run.name,
            "seed": seed.history.seed,
            "step": step,
            "step_of_run": step - seed.history.first_step,
            "value": value,
        }
        for line in picture.lines
        for seed in line.seeds
        for step, value in seed.values.items()
    ]


def _top(picture: CurvePicture) -> float | None:
    """The upper limit of the y-axis for losses, which crops the steep initial descent of fine-tuning.

    Everything after the last validation before the best one stays visible, unless it is worse than any start.
    """
    if not picture.lower_is_better:
        return None
    worth_seeing, starts = [], []
    for line in picture.lines:
        for seed in line.seeds:
            steps = sorted(seed.values)
            if not line.is_mask and seed.history.first_step == 0:
                starts.append(seed.values[steps[0]])
                best = min(steps, key=lambda step: seed.values[step])
                steps = steps[max(0, steps.index(best) - 1) :]
            worth_seeing += [seed.values[step] for step in steps]
    lowest = min(worth_seeing)
    limit = min(starts, default=max(worth_seeing))
    highest = max([value for value in worth_seeing if value <= limit], default=lowest)
    return highest + 0.05 * (highest - lowest) if highest > lowest else None


def _draw(picture: CurvePicture, top: float | None, canvas: Canvas) -> None:
    closer = _closer(picture, top)
    whole, *close = canvas.subplots(1, 2, width_ratios=(3, 2)) if closer else [canvas.subplots()]
    last = max(step for line in picture.lines for seed in line.seeds for step in seed.values)
    for axes in (whole, *close):
        for line in picture.lines:
            draw: Callable[[Axes, Curve, float], None] = _draw_level if line.is_level else _draw_line
            draw(axes, line, last)
        if picture.star is not None:
            axes.plot(*picture.star, label="best FFT", **STAR)
    if top is not None:
        lowest = min(value for line in picture.lines for seed in line.seeds for value in seed.values.values())
        whole.set_ylim(lowest - 0.08 * (top - lowest), top)
    if closer is not None:
        close[0].set_xlim(*closer[0])
        close[0].set_ylim(*closer[1])
        close[0].set_xlabel("enlarged")
    only_masks = all(line.is_mask for line in picture.lines)
    whole.set_xlabel("optimizer step" if only_masks else "optimizer steps since the pre-trained model")
    whole.set_ylabel(picture.y_label)
    put_legend(canvas, dict(zip(*reversed(whole.get_legend_handles_labels()), strict=True)))


def _closer(picture: CurvePicture, top: float | None) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Axis limits of the part where masks are learned; None if it is wide enough already."""
    masks = [line for line in picture.lines if line.is_mask and not line.is_level]
    if picture.star is None or not masks:
        return None
    last = max(step for line in picture.lines for seed in line.seeds for step in seed.values)
    end = max(step for line in masks for seed in line.seeds for step in seed.values)
    start, height = picture.star
    if end - start > _NARROW * last or end <= start:
        return None
    levels = [line for line in picture.lines if line.is_level]
    values = [value for line in (*masks, *levels) for seed in line.seeds for value in seed.values.values()]
    shown = [height, *(value for value in values if top is None or value <= top)]
    lowest, highest = min(shown), max(shown)
    margin, room = 0.12 * (end - start), 0.08 * (highest - lowest or 1.0)
    return (start - margin, end + margin), (lowest - room, highest + room)


def _draw_line(axes: Axes, line: Curve, last: float) -> None:
    """Draws the mean over seeds and its band as far as their steps agree, then each seed.

    A seed that is still training is not part of the mean of finished seeds.
    """
    style = style_of(line.state).keywords()
    thin = {**style, "linewidth": 0.8, "markersize": 3.0}
    finished = [seed for seed in line.seeds if seed.history.is_finished]
    averaged = finished or line.seeds
    shared = _shared_steps([seed.own for seed in averaged])
    start = fmean(seed.history.first_step for seed in averaged)
    if shared:
        columns = [[seed.own[step] for seed in averaged] for step in shared]
        places = [start + step for step in shared]
        axes.plot(
            places,
            [fmean(column) for column in columns],
            label=drawn_text(line.label),
            markevery=_every(shared),
            **style,
        )
        if len(averaged) > 1:
            lows, highs = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(places, lows, highs, color=style["color"], alpha=_BAND_ALPHA, linewidth=0)
    for number, seed in enumerate(line.seeds):
        is_averaged = bool(shared) and seed in averaged
        rest = [step for step in sorted(seed.own) if not is_averaged or step >= shared[-1]]
        if is_averaged and len(rest) < 2:
            continue
        first = start if is_averaged else seed.history.first_step
        own_label = drawn_text(line.label) if number == 0 and not shared else None
        axes.plot([first + step for step in rest], [seed.own[step] for step in rest], label=own_label, **thin)


def _shared_steps(own: Sequence[Mapping[int, float]]) -> list[int]:
    """The initial steps at which all seeds were measured; empty if the steps do not agree."""
    shared = sorted(set.intersection(*(set(values) for values in own)))
    if not shared or (len(own) > 1 and len(shared) < 2):
        return []
    agree = all([step for step in sorted(values) if step <= shared[-1]] == shared for values in own)
    return shared if agree else []


def _every(steps: Sequence[int]) -> int:
    return max(1, len(steps) // 12)


def _draw_level(axes: Axes, line: Curve, last: float) -> None:
    """Draws a line over the whole width and the range of the seeds."""
    style = style_of(line.state).keywords()
    values = [value for seed in line.seeds for value in seed.values.values()]
    mean = fmean(values)
    axes.plot([0, last], [mean, mean], label=drawn_text(line.label), **{**style, "linewidth": 1.0})
    if len(values) > 1:
        axes.fill_between([0, last], min(values), max(values), color=style["color"], alpha=_BAND_ALPHA, linewidth=0)
