"""The card of a masked checkpoint: names of models and tensors stay text in its Markdown and front matter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from hypothesis import given, settings
from markdown_it import MarkdownIt

from mftctl.files.names import is_recordable
from mftctl.masking.checkpoints.model_card import write_model_card
from mftctl.masking.mask import Mask
from tests.hostile_texts import OBEYED, TEXTS
from tests.reporting.mask_runs import make_mask

NAMES = TEXTS.filter(lambda text: text != "" and is_recordable(text))
"""The others no mask has: its document refuses them."""


def named(text: str, kind: str) -> Mask:
    """A mask whose models have this name."""
    mask = make_mask({"layers.0|`x`<b>.weight": torch.tensor([[True, False]])}, kind=kind)
    tuned = text if kind == "delta" else None
    metadata = dataclasses.replace(mask.metadata, base_model=text, tuned_model=tuned, run_id=text, base_revision=text)
    return Mask({name: mask[name] for name in mask.names()}, mask.records, metadata)


def parts(text: str, kind: str) -> tuple[str, str, list[str]]:
    """Front matter and body of a card, and all elements of the body that are not plain text."""
    card = write_model_card(named(text, kind), base_model=text, mask_path=None)
    front, _, body = card.removeprefix("---\n").partition("\n---\n\n# ")
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(f"# {body}")
    every = [part for token in tokens for part in (token, *(token.children or []))]
    return front, body, [token.type for token in every if token.type not in ("text", "inline")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight", "delta"])
@settings(max_examples=30)
@given(text=NAMES)
def test_a_card_has_the_same_parts_whatever_the_names_are(kind: str, text: str) -> None:
    front, body, found = parts(text, kind)
    assert found == parts("name", kind)[2]
    assert not OBEYED & set(body)
    stated = yaml.safe_load(front)["base_model"]
    assert (stated if kind == "weight" else stated[0]) is not None


@pytest.mark.parametrize(
    ("kind", "method", "tag", "paper"),
    [
        ("weight", "learned", "mask-fine-tuning", "2503.22764"),
        ("delta", "learned", "mask-fine-tuning", "2503.22764"),
        ("delta", "random", "mask-fine-tuning", "2503.22764"),
        ("delta", "drop-trivial", "one-off-drop", "2406.15330"),
    ],
)
def test_a_card_cites_the_paper_of_the_method(kind: str, method: str, tag: str, paper: str) -> None:
    mask = named("name", kind)
    made = Mask(
        {name: mask[name] for name in mask.names()}, mask.records, dataclasses.replace(mask.metadata, method=method)
    )
    card = write_model_card(made, base_model="name", mask_path=None)
    assert yaml.safe_load(card.split("---")[1])["tags"] == [tag, "mftctl"]
    assert f"arxiv.org/abs/{paper}" in card
    assert ("reset to the values of" in card) == (kind == "delta")
