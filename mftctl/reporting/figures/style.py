"""Style and rendering of report figures: one style per state, distinct in colour, line and marker; SVG and PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mftctl.experiments.state_names import FFT, place_of
from mftctl.reporting.file_names import own_name
from mftctl.text import visible, visible_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INK = "#1b1b1b"
GRID = "#8c8c8c"
COLOUR_MAP = "cividis"
_LONGEST_TEXT = 120


# Okabe and Ito's colours without black and yellow, which are invisible on dark and light pages.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "d", "8")
STYLES = len(_COLOURS) * len(_MARKERS)
"""Number of styles that differ in colour or marker."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may contain text that parses as a formula, valid or not
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a report.

    Attributes:
        name: File name without an extension, such as `loss-by-step`.
        title: A short title.
        caption: What the figure shows, its sources and its limits.
        data: The plotted numbers, one mapping per point, as plain data for `report.json`.
        runs: Names of the runs it was made from.
        draw: Draws the figure on a canvas.
        width_inches: Total width.
        height_inches: Total height.
    """

    name: str
    title: str
    caption: str
    data: tuple[Mapping[str, Any], ...]
    runs: tuple[str, ...]
    draw: Callable[[Canvas], None]
    width_inches: float = 6.4
    height_inches: float = 3.6


@dataclass(frozen=True, slots=True)
class LineStyle:
    """Line style of a state; no two states share all three attributes.

    Attributes:
        color: A matplotlib colour.
        linestyle: A matplotlib line style.
        marker: A matplotlib marker.
    """

    color: str
    linestyle: Any
    marker: str

    def keywords(self) -> dict[str, Any]:
        """Arguments for `Axes.plot`."""
        return {"color": self.color, "linestyle": self.linestyle, "marker": self.marker}


def style_of(label: str) -> LineStyle:
    """The style of a state in every figure: FFT in ink, the others distinguishable even in greyscale.

    Args:
        label: Label of the state, such as `MFT, paper`, without its variants.
    """
    return LineStyle(INK, "-", "h") if label == FFT else numbered_style(place_of(label))


def numbered_style(number: int) -> LineStyle:
    """The style of a numbered line that is not a state, such as a group size."""
    colour = number + number // len(_MARKERS)  # so that points without a line, too, differ in all `STYLES`
    return LineStyle(_COLOURS[colour % len(_COLOURS)], _LINES[number % len(_LINES)], _MARKERS[number % len(_MARKERS)])


@dataclass(frozen=True, slots=True)
class Drawing:
    """A rendered figure.

    Attributes:
        svg: SVG with real text and a transparent background.
        png: PNG at 200 dpi on white.
    """

    svg: str
    png: bytes


def render(figure: Figure) -> Drawing:
    """The figure in both formats; equal data gives equal bytes."""
    svg, png = io.StringIO(), io.BytesIO()
    with warnings.catch_warnings(), _canvas(figure) as canvas:
        # For names in a script that the font lacks (SVG keeps them as text), and names too long for the layout.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|constrained_layout not applied|.*support .* natively")
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return Drawing(visible(svg.getvalue()), png.getvalue())


def drawn_text(text: str) -> str:
    """Shortens a text for drawing, removes control characters, and keeps legends from hiding it.

    Args:
        text: Any text, possibly untrusted.
    """
    line = _short(visible_line(text))
    return f" {line}" if line.startswith("_") else line


def _short(text: str) -> str:
    return f"{text[:_LONGEST_TEXT]}…" if len(text) > _LONGEST_TEXT else text


@contextmanager
def _canvas(figure: Figure) -> Iterator[Canvas]:
    """Draws the figure on its own canvas, without a window and without changing matplotlib's global state."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    # With the name as salt, IDs are unique across the figures of a page.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=(figure.width_inches, figure.height_inches), layout="constrained")
        figure.draw(canvas)
        for text in canvas.findobj(Text):
            text.set_text(_short(visible(text.get_text())))
        yield canvas


_ROW_INCHES = 0.18


# For labels in the legend's font on a figure of the default width.
_LONGEST = {3: 22, 2: 40}


def legend_height_inches(labels: Sequence[str]) -> float:
    """The height that a legend adds to a figure.

    Args:
        labels: The labels of the legend.
    """
    return _ROW_INCHES * -(-len(labels) // _columns(labels))


def put_legend(canvas: Canvas, handles: Mapping[str, Any]) -> None:
    """Puts the legend below all axes.

    Args:
        canvas: A canvas with a constrained layout.
        handles: Matplotlib artists by label; without any, no legend is drawn.
    """
    labels = list(handles)
    if not labels:
        return
    canvas.legend(list(handles.values()), labels, loc="outside lower center", ncols=_columns(labels), handlelength=3.2)


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return next((columns for columns, length in _LONGEST.items() if longest <= length), 1)


def with_own_names(figures: Iterable[Figure]) -> list[Figure]:
    """The figures with unique names."""
    taken: set[str] = set()
    return [replace(figure, name=own_name(figure.name, taken)) for figure in figures]
