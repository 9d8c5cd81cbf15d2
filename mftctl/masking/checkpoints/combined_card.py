"""Model cards (README.md) of averaged and interpolated checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCardData

from mftctl.masking.checkpoints.model_card import in_table
from mftctl.text import markdown_code, markdown_text

_AVERAGE_PAPER = "model soups, https://arxiv.org/abs/2203.05482"
_INTERPOLATION_PAPER = "WiSE-FT, https://arxiv.org/abs/2109.01903"


def write_average_card(names: Sequence[str], weights: Sequence[float]) -> str:
    """The card's text: YAML front matter with `base_model`, then the checkpoints and their weights.

    Args:
        names: Names or folders of the checkpoints.
        weights: The weight of each, with sum 1.
    """
    rows = "\n".join(
        f"| {in_table(markdown_code(name))} | {weight:.6g} |" for name, weight in zip(names, weights, strict=True)
    )
    return (
        f"{_front_matter(names, 'averaged')}# {markdown_text(names[0])}, averaged\n\n"
        f"This is the weighted average of {len(names)} checkpoints of the same model. Its configuration, tokenizer and "
        "generation settings are those of the first.\n\n"
        f"| Checkpoint | Weight |\n| --- | ---: |\n{rows}\n\nMade with mftctl ({_AVERAGE_PAPER}).\n"
    )


def write_interpolated_card(base: str, tuned: str, *, share: float, loss: float, records: int) -> str:
    """The card's text: YAML front matter with `base_model`, then how far the model is from its base.

    Args:
        base: Name or folder of the model before fine-tuning.
        tuned: Name or folder of the fine-tuned model.
        share: The share of the change made by fine-tuning.
        loss: Validation loss per answer token.
        records: Number of validation records that chose the share.
    """
    return (
        f"{_front_matter([base, tuned], 'interpolated')}# {markdown_text(tuned)}, interpolated\n\n"
        f"This is {markdown_code(base)} plus {share:g} times the change that fine-tuning it to {markdown_code(tuned)} "
        "made to its weights. The tokenizer and the configuration are those of the fine-tuned model.\n\n"
        f"| Interpolation | |\n| --- | --- |\n| Share | {share:g} |\n| Validation loss | {loss:.4f} |\n"
        f"| Validation records | {records:,} |\n\nMade with mftctl ({_INTERPOLATION_PAPER}).\n"
    )


def _front_matter(models: Sequence[str], tag: str) -> str:
    data = ModelCardData(base_model=list(models), library_name="transformers", tags=[tag, "mftctl"])
    return f"---\n{data.to_yaml()}\n---\n\n"
