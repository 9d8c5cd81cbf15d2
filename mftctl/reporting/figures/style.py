"""How every figure of a report looks: one style for each state, told apart by colour, line and marker; SVG and PNG."""

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


# Okabe and Ito's colours without black and yellow, which are lost on a dark and on a light page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "d")
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
    "text.parse_math": False,  # a name may hold what would be a formula, whole or broken
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a report.

    Attributes:
        name: Its file's, without an ending: `loss-by-step`.
        title: What it shows, in a few words.
        caption: What is to be seen, what it was made from, and what it cannot tell.
        data: The numbers drawn, a mapping a point, plain data for `report.json`.
        runs: Names of the runs it was made from.
        draw: Draws it.
        width_inches: Of the whole.
        height_inches: Of the whole.
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
    """How the line of a state is drawn; no two states share all three.

    Attributes:
        color: Of matplotlib.
        linestyle: Of matplotlib.
        marker: Of matplotlib.
    """

    color: str
    linestyle: Any
    marker: str

    def keywords(self) -> dict[str, Any]:
        """Arguments for `Axes.plot`."""
        return {"color": self.color, "linestyle": self.linestyle, "marker": self.marker}


def style_of(label: str) -> LineStyle:
    """The style of a state in every figure: FFT in ink, each other in its own way, also in grey.

    Args:
        label: Of the state, such as `MFT, paper`, without what tells its variants apart.
    """
    return LineStyle(INK, "-", "h") if label == FFT else numbered_style(place_of(label))


def numbered_style(number: int) -> LineStyle:
    """The style of one of many lines that are no states, such as group sizes."""
    return LineStyle(_COLOURS[number % len(_COLOURS)], _LINES[number % len(_LINES)], _MARKERS[number % len(_MARKERS)])


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as drawn.

    Attributes:
        svg: With real text, on no background.
        png: 200 dots an inch, on white.
    """

    svg: str
    png: bytes


def render(figure: Figure) -> Drawing:
    """The figure in both forms; the same bytes for the same data."""
    svg, png = io.StringIO(), io.BytesIO()
    with warnings.catch_warnings(), _canvas(figure) as canvas:
        # Of a name in a script that the font lacks, which SVG has as text, and of one that leaves no room.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|constrained_layout not applied|.*support .* natively")
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return Drawing(visible(svg.getvalue()), png.getvalue())


def drawn_text(text: str) -> str:
    """A text as it is drawn: in short, without control characters, and none that a legend would leave out.

    Args:
        text: Of any origin.
    """
    line = _short(visible_line(text))
    return f" {line}" if line.startswith("_") else line


def _short(text: str) -> str:
    return f"{text[:_LONGEST_TEXT]}…" if len(text) > _LONGEST_TEXT else text


@contextmanager
def _canvas(figure: Figure) -> Iterator[Canvas]:
    """The figure on a canvas of its own: no window, and nothing left in matplotlib's state."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    # With the name as salt, the ids of several figures in one page differ.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=(figure.width_inches, figure.height_inches), layout="constrained")
        figure.draw(canvas)
        for text in canvas.findobj(Text):
            text.set_text(_short(visible(text.get_text())))
        yield canvas


_ROW_INCHES = 0.18


# Of labels in the legend's font, on a figure of the usual width.
_LONGEST = {3: 22, 2: 40}


def legend_height_inches(labels: Sequence[str]) -> float:
    """How much the legend adds to the height of a figure.

    Args:
        labels: Of the legend.
    """
    return _ROW_INCHES * -(-len(labels) // _columns(labels))


def put_legend(canvas: Canvas, handles: Mapping[str, Any]) -> None:
    """Puts the legend below all axes.

    Args:
        canvas: With a constrained layout.
        handles: What matplotlib drew, by label; none needs no legend.
    """
    labels = list(handles)
    if not labels:
        return
    canvas.legend(list(handles.values()), labels, loc="outside lower center", ncols=_columns(labels), handlelength=3.2)


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return next((columns for columns, length in _LONGEST.items() if longest <= length), 1)


def with_own_names(figures: Iterable[Figure]) -> list[Figure]:
    """The figures, each with a name that none before it has."""
    taken: set[str] = set()
    return [replace(figure, name=own_name(figure.name, taken)) for figure in figures]
