"""A study of FFT, continued FFT and two masks, and helpers that read its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.curves import curve_figures
from mftctl.reporting.figures.style import Figure
from tests.reporting.training_runs import write_training

FFT_LOSSES = {0: 2.0, 10: 1.0, 20: 0.8, 30: 0.9}


def figures_of(root: Path) -> list[Figure]:
    figures, problems = curve_figures(list_runs(root)[0])
    assert problems == []
    return figures


def figures_and_problems_of(root: Path) -> tuple[list[Figure], list[str]]:
    runs, errors = list_runs(root)
    figures, problems = curve_figures(runs)
    return figures, [*(f"{error.path}: {error.message}" for error in errors), *problems]


def points_of(figure: Figure, state: str) -> dict[int, float]:
    return {point["step"]: point["value"] for point in figure.data if point["state"] == state}


def drawn(figure: Figure) -> Canvas:
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    return canvas


def lines_of(figure: Figure) -> list[Any]:
    """The lines of the main axes, without those of the inset."""
    return drawn(figure).axes[0].get_lines()


def star_of(figure: Figure) -> tuple[float, float] | None:
    stars = [line for line in lines_of(figure) if line.get_marker() == "*"]
    return tuple(stars[0].get_xydata()[0].tolist()) if stars else None


def labels_of(figure: Figure) -> list[str]:
    [legend] = drawn(figure).legends
    return [text.get_text() for text in legend.get_texts()]


def write_study(root: Path, seed: int = 0, shift: float = 0.0) -> None:
    """FFT, continued FFT, a learned and a random mask of one seed; `shift` is added to all losses."""
    first = 1 + 10 * seed
    options = {"seed": seed}
    losses = {step: loss + shift for step, loss in FFT_LOSSES.items()}
    fft = write_training(root, first, "FFT", losses, stage="fft", **options)
    on_fft: dict[str, Any] = {**options, "parents": [fft], "before": "FFT"}
    continued = {0: 0.8 + shift, 10: 0.95 + shift}
    write_training(root, first + 1, "continued FFT", continued, options={"keep": "last"}, stage="more", **on_fft)
    # A learned mask is validated on half of the records, on which the same model has a different loss.
    mask = {0: 0.7 + shift, 4: 0.6 + shift}
    masks = {"command": "mask-train", **on_fft}
    write_training(root, first + 2, "MFT", mask, stage="mft", unmasked_loss=0.7 + shift, **masks)
    random = {0: 0.84 + shift}
    method = {"method": "random"}
    write_training(
        root, first + 3, "random mask", random, stage="random", options=method, unmasked_loss=0.8 + shift, **masks
    )
