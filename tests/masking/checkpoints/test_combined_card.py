from __future__ import annotations

from huggingface_hub import ModelCard

from mftctl.masking.checkpoints.combined_card import write_average_card, write_interpolated_card


def test_an_average_lists_its_checkpoints() -> None:
    card = ModelCard(write_average_card(["org/a", "runs/001-fft/model"], (0.75, 0.25)))
    assert card.data.base_model == ["org/a", "runs/001-fft/model"]
    assert card.data.tags == ["averaged", "mftctl"]
    for text in (
        "# org/a, averaged",
        "average of 2 checkpoints",
        "| `org/a` | 0.75 |",
        "| `runs/001-fft/model` | 0.25 |",
    ):
        assert text in card.text


def test_an_interpolation_states_its_share_and_its_loss() -> None:
    card = ModelCard(write_interpolated_card("org/base", "org/tuned", share=0.8, loss=0.61234, records=40))
    assert card.data.base_model == ["org/base", "org/tuned"]
    for text in ("`org/base` plus 0.8 times", "| Share | 0.8 |", "| Validation loss | 0.6123 |", "records | 40 |"):
        assert text in card.text


def test_a_bar_in_a_name_does_not_end_the_cell() -> None:
    assert "| `a\\|b` | 0.5 |" in write_average_card(["a|b", "c"], (0.5, 0.5))
