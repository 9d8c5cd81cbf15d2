"""Untrusted text in Markdown, as parsed by a CommonMark parser with GitHub tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mftctl.text import markdown_code, markdown_item, markdown_label, markdown_text, visible_line
from tests.hostile_texts import TEXTS

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def read(text: str) -> tuple[list[str], str]:
    """The kinds of all elements of a document except plain text, and the visible text."""
    kinds: list[str] = []
    seen: list[str] = []

    def look_at(tokens: list[Token]) -> None:
        for token in tokens:
            if token.children is not None:
                look_at(token.children)
            elif token.type == "text":
                seen.append(token.content)
            else:
                kinds.append(token.type)
                seen.append(token.content)

    look_at(PARSER.parse(text))
    return kinds, " ".join("".join(seen).split())


def plain(text: str) -> str:
    return " ".join(visible_line(text).split())


@pytest.mark.parametrize("text", ["exact_match on test.jsonl", "0.8199 (-0.0609*) [-0.0720, -0.0495]", "MFT & 2 ± 1"])
def test_ordinary_report_text_is_unchanged(text: str) -> None:
    assert markdown_text(text) == text


@given(TEXTS)
def test_a_cell_is_one_cell_of_text(text: str) -> None:
    kinds, seen = read(f"| a | b |\n|---|---|\n| {markdown_text(text)} | end |\n")
    assert kinds.count("td_open") == 2
    assert seen == "".join(["ab", plain(text), "end"])
    assert set(kinds) <= {
        f"{name}_{side}" for name in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")
    }


@given(TEXTS)
def test_a_heading_is_one_heading_of_text(text: str) -> None:
    kinds, seen = read(f"## Title {markdown_text(text)} end\n")
    assert kinds == ["heading_open", "heading_close"]
    assert seen == " ".join(f"Title {plain(text)} end".split())


@given(TEXTS)
def test_an_item_is_one_item_of_text(text: str) -> None:
    kinds, seen = read(f"- {markdown_item(f'{text} end')}\n")
    nested = ("bullet_list", "list_item", "paragraph")
    assert kinds == [*(f"{name}_open" for name in nested), *(f"{name}_close" for name in reversed(nested))]
    assert seen == " ".join(f"{plain(text)} end".split())


@given(TEXTS)
def test_a_picture_has_its_text_as_its_name(text: str) -> None:
    tokens = PARSER.parse(f"![a {markdown_label(text)} b](figures/x.svg)\n")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    [image] = tokens[1].children or []
    assert (image.type, image.attrs["src"]) == ("image", "figures/x.svg")


@given(TEXTS)
def test_code_is_one_piece_of_code(text: str) -> None:
    tokens = PARSER.parse(f"Next: {markdown_code(text)}. Then.\n")
    [before, code, after] = tokens[1].children or []
    assert (before.content, code.type, after.content) == ("Next: ", "code_inline", ". Then.")
    assert code.content.strip() == visible_line(text.replace("\n", "\\n")).strip()
