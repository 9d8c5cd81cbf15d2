"""Model cards (README.md) of fine-tuned models."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from mftctl.text import markdown_code, markdown_text


def write_tuned_card(state: str, *, base: str, template: str) -> str:
    """The card's text: YAML front matter with `base_model`, then a Markdown summary of the fine-tuning.

    Args:
        state: The state of the model after fine-tuning, such as `FFT` or `continued GMT`.
        base: Name or folder of the model that fine-tuning started from.
        template: The chat template of its records, which is stored in the tokenizer.
    """
    front_matter = ModelCardData(base_model=base, library_name="transformers", tags=["fine-tuned", "mftctl"]).to_yaml()
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(base)}, fine-tuned\n\n"
        f"This is {markdown_code(base)} after {markdown_text(state)}.\n\n"
        f"| Fine-tuning | |\n| --- | --- |\n| Method | {markdown_text(state)} |\n"
        f"| Chat template | {markdown_text(template)} |\n\nMade with mftctl.\n"
    )
