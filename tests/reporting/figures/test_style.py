from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure as Canvas

from mftctl.experiments.state_names import STATE_ORDER
from mftctl.reporting.figures.style import INK, STYLES, Figure, numbered_style, render, style_of


def make_figure(name: str = "line", label: str = "a < b & c") -> Figure:
    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.plot([0, 1], [1, 2], label=label, **style_of("MFT").keywords())
        axes.set_xlabel("step")
        axes.legend()

    return Figure(name, "A line", "It rises.", ({"step": 0, "value": 1},), ("001-fft",), draw)


def test_no_two_states_look_alike_even_without_colour() -> None:
    shapes = [(str(style_of(state.label).linestyle), style_of(state.label).marker) for state in STATE_ORDER]
    assert len(set(shapes)) == len(STATE_ORDER)


def test_no_two_points_look_alike() -> None:
    points = {(numbered_style(number).color, numbered_style(number).marker) for number in range(STYLES)}
    assert len(points) == STYLES
    states = {(style_of(state.label).color, style_of(state.label).marker) for state in STATE_ORDER}
    assert len(states) == len(STATE_ORDER)


def test_unknown_states_get_a_numbered_style() -> None:
    assert style_of("FFT").color == INK
    assert style_of("something new") == numbered_style(len(STATE_ORDER))


@pytest.mark.slow
def test_the_same_figure_gives_the_same_bytes_with_real_text() -> None:
    svg = render(make_figure()).svg
    assert svg == render(make_figure()).svg
    text = "".join(ET.fromstring(svg).itertext())
    assert "step" in text
    assert "a < b & c" in text


@pytest.mark.slow
def test_two_figures_on_one_page_share_no_id() -> None:
    found = [
        {
            item.get("id")
            for item in ET.fromstring(render(make_figure(name)).svg).iter()
            if item.tag.endswith("clipPath")
        }
        for name in ("one", "two")
    ]
    assert found[0]
    assert not set.intersection(*found)


@pytest.mark.slow
def test_the_picture_is_on_white_and_always_the_same() -> None:
    from PIL import Image

    png = render(make_figure()).png
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (1280, 720)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert render(make_figure()).png == png


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(6), 2)))
def test_lines_that_are_not_states_differ_in_every_respect(one: int, other: int) -> None:
    first, second = numbered_style(one), numbered_style(other)
    assert first.color != second.color
    assert first.marker != second.marker
