"""Training figures: validation loss and scores by step, for all methods of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Parents
from mftctl.experiments.state_names import FFT, known_state, place_of
from mftctl.reporting.figures.curve_drawing import Curve, CurvePicture, SeedCurve, curve_figure
from mftctl.reporting.figures.style import Figure, with_own_names
from mftctl.reporting.figures.training_histories import History, Measure, read_histories
from mftctl.reporting.file_names import slug
from mftctl.reporting.paired_change import LOWER_IS_BETTER

_MOST_LINES = 10


@dataclass(frozen=True, slots=True)
class _Method:
    """The seeds of one method, oldest first, and the number of variants of its state."""

    label: str
    state: str
    seeds: tuple[History, ...]
    variants: int


def curve_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """Validation loss and each score measured during training, by step: one figure per model, data and metric.

    More than ten methods are split into two figures; selective updates get one of their own.

    Args:
        runs: The runs, oldest first.

    Returns:
        The figures, and one line per run that cannot be used.

    Source: MFT, figure 2.
    """
    histories, problems = read_histories(runs)
    families: dict[tuple[str, str, bool], list[History]] = {}
    for history in histories:
        families.setdefault((*history.family, history.is_of_preferences), []).append(history)
    figures = []
    for (origin, _, _), members in families.items():
        methods = _methods(members)
        losses, unplaced = _losses(methods)
        problems += unplaced
        for picture in (losses, *(_scores(methods, measure) for measure in _measures(methods))):
            if picture is not None:
                figures += [curve_figure(part, origin) for part in _in_parts(picture)]
    return with_own_names(figures), problems


def _methods(members: Sequence[History]) -> list[_Method]:
    """One method per state, in the order of the papers: the unswept variant with the most seeds.

    If all variants belong to a sweep, the one with the best validation loss is chosen, as a user would do.
    """
    variants: dict[str, dict[str, list[History]]] = {}
    for history in members:
        variants.setdefault(history.state, {}).setdefault(history.method, []).append(history)

    def is_swept(seeds: Sequence[History]) -> bool:
        return "[" in seeds[0].stage

    def rank(seeds: Sequence[History]) -> tuple[bool, int, float]:
        changes = [min(item.losses.values()) - (item.reference_loss or 0.0) for item in seeds if item.losses]
        return (is_swept(seeds), -len(seeds), fmean(changes) if changes else 0.0)

    methods = []
    for state in sorted(variants, key=place_of):
        groups = list(reversed(variants[state].values()))  # the newest first among equals
        chosen = min(groups, key=rank)
        alike = [group for group in groups if is_swept(group) == is_swept(chosen)]
        variant = chosen[0].stage.partition("[")[2].rstrip("]") or chosen[0].stage
        label = state if len(alike) == 1 else f"{state} ({variant})"
        methods.append(_Method(label, state, tuple(chosen), len(groups)))
    return methods


def _losses(methods: Sequence[_Method]) -> tuple[CurvePicture | None, list[str]]:
    """Validation loss by step, as a difference from the best FFT if there is one, and a line per run left out."""
    if methods and methods[0].seeds[0].is_of_preferences:
        return _preference_losses(methods)
    has_fft = any(method.state == FFT for method in methods)
    only_masks = all(item.run.record.command == "mask-train" for method in methods for item in method.seeds)
    is_difference = has_fft or only_masks
    lines, problems = _loss_lines(methods, is_difference=is_difference)
    if not any(len(seed.values) > 1 for line in lines for seed in line.seeds):
        return None, problems
    best = [item for item in _best_ffts(methods) if item.losses]
    star = (fmean(item.first_step + item.kept_step for item in best), 0.0) if best else None
    against = "the best FFT" if has_fft else "the unmasked model"
    captions = ["Validation loss per answer token."]
    if is_difference:
        captions = [
            f"Validation loss per answer token minus that of {against} on the same records (for a learned mask, "
            "one half of the validation data); below 0 is better."
        ]
    if best:
        captions.append(f"The loss at the star is {fmean(item.losses[item.kept_step] for item in best):.4f}.")
    y_label = f"loss relative to {against}" if is_difference else "validation loss"
    picture = CurvePicture(
        "loss-by-step",
        f"Validation loss by step{', relative to ' + against if is_difference else ''}",
        y_label,
        tuple(lines),
        star,
        True,
        tuple(captions),
    )
    return picture, problems


def _preference_losses(methods: Sequence[_Method]) -> tuple[CurvePicture | None, list[str]]:
    """Validation loss of preferences by step."""
    lines, problems = _loss_lines(methods, is_difference=False)
    if not any(len(seed.values) > 1 for line in lines for seed in line.seeds):
        return None, problems
    captions = "Validation loss per preference; ln 2 = 0.6931 is that of the model before training."
    title = "Validation loss of preferences by step"
    picture = CurvePicture("preference-loss-by-step", title, "DPO loss", tuple(lines), None, True, (captions,))
    return picture, problems


def _loss_lines(methods: Sequence[_Method], *, is_difference: bool) -> tuple[list[Curve], list[str]]:
    """The losses of each method, and a line per run left out since its reference loss is unknown."""
    lines, problems = [], []
    for method in methods:
        seeds = []
        for item in method.seeds:
            if not item.losses:
                continue
            if is_difference and item.reference_loss is None:
                problems.append(
                    f"{item.run.folder}: left out of the loss curves: "
                    "the loss of the best FFT on its validation records is unknown"
                )
                continue
            base = (item.reference_loss or 0.0) if is_difference else 0.0
            seeds.append(SeedCurve(item, {item.first_step + step: loss - base for step, loss in item.losses.items()}))
        lines += [Curve(method.label, method.state, tuple(seeds), method.variants)] if seeds else []
    return lines, problems


def _best_ffts(methods: Sequence[_Method]) -> list[History]:
    """The best FFT of each seed; unfinished runs count only if no run has finished."""
    found = [item for method in methods if method.state == FFT for item in method.seeds]
    return [item for item in found if item.is_finished] or found


def _measures(methods: Sequence[_Method]) -> list[Measure]:
    """The metrics that at least one training run has measured more than once."""
    found = [
        measure
        for method in methods
        for item in method.seeds
        for measure, values in item.scores.items()
        if len(values) > 1
    ]
    return sorted(set(found))


def _scores(methods: Sequence[_Method], measure: Measure) -> CurvePicture:
    """One score by step."""
    lines = []
    for method in methods:
        seeds = tuple(
            SeedCurve(item, {item.first_step + step: value for step, value in sorted(item.scores[measure].items())})
            for item in method.seeds
            if measure in item.scores
        )
        lines += [Curve(method.label, method.state, seeds, method.variants)] if seeds else []
    stars = _measured_best(methods, measure)
    star = (fmean(step for step, _ in stars), fmean(value for _, value in stars)) if stars else None
    words = measure.metric.replace("_", " ")
    captions = [f"{words.capitalize()} on the same {measure.samples} samples of {measure.dataset}."]
    error = max(item.standard_errors.get(measure, 0.0) for method in methods for item in method.seeds)
    if error:
        captions.append(f"Each point has a standard error of up to {error:.3f}, so small differences are noise.")
    if star is None and any(method.state == FFT for method in methods):
        captions.append("There is no star because the best FFT was not measured.")
    return CurvePicture(
        f"score-by-step-{slug(measure.dataset)}-{slug(measure.metric)}",
        f"{measure.dataset}: {words} by step",
        words,
        tuple(lines),
        star,
        measure.metric in LOWER_IS_BETTER,
        tuple(captions),
    )


def _measured_best(methods: Sequence[_Method], measure: Measure) -> list[tuple[int, float]]:
    """Step and score of each seed's best FFT, measured at that step or at the start of a training run from it."""
    found = []
    histories = [item for method in methods for item in method.seeds]
    for best in _best_ffts(methods):
        value = best.scores.get(measure, {}).get(best.kept_step)
        if value is None:
            parents = [best.run.name]
            after = [
                item.scores.get(measure, {}).get(0)
                for item in histories
                if item.run.record.command == "fft" and Parents.read(item.run.record.inputs).parents == parents
            ]
            value = next((score for score in after if score is not None), None)
        if value is not None:
            found.append((best.first_step + best.kept_step, value))
    return found


def _in_parts(picture: CurvePicture) -> list[CurvePicture]:
    """The picture, split into masks and selective updates (both with FFT) if it has too many lines."""
    if len(picture.lines) <= _MOST_LINES:
        return [picture]
    updates = tuple(line for line in picture.lines if line.state == FFT or _is_update(line.state))
    others = tuple(line for line in picture.lines if not _is_update(line.state))
    if len(updates) < 2 or len(others) < 2:
        return [_cut(picture)]
    return [
        _cut(replace(picture, lines=others)),
        _cut(
            replace(picture, name=f"{picture.name}-updates", title=f"{picture.title}: selective updates", lines=updates)
        ),
    ]


def _is_update(label: str) -> bool:
    state = known_state(label)
    return state is not None and state.is_update


def _cut(picture: CurvePicture) -> CurvePicture:
    """The picture with as many lines as stay distinguishable; the caption names the rest."""
    left_out = [line.label for line in picture.lines[_MOST_LINES:]]
    if not left_out:
        return picture
    captions = (*picture.captions, f"Omitted for readability: {', '.join(left_out)}.")
    return replace(picture, lines=picture.lines[:_MOST_LINES], captions=captions)
