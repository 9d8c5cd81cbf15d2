"""The card of a fine-tuned model."""

from __future__ import annotations

import yaml

from mftctl.workflows.tuned_model import write_tuned_card


def test_it_names_base_method_and_template() -> None:
    card = write_tuned_card("continued GMT", base="org/model", template="tulu, kind=true")
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["base_model"] == "org/model"
    assert "# org/model, fine-tuned\n" in body
    assert "| Method | continued GMT |\n| Chat template | tulu, kind=true |\n" in body


def test_a_name_stays_text() -> None:
    card = write_tuned_card("FFT", base="<b>|x", template="a|b")
    assert "<b>" not in card.split("---\n", 2)[2].replace("`<b>|x`", "")
    assert "| Chat template | a\\|b |" in card
