"""Model cards (README.md) of fine-tuned models, LoRA adapters and merged models."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from peft import LoraConfig

from mftctl.text import markdown_code, markdown_text


def write_lora_card(adapter: LoraConfig, *, merged: bool, held: str, quantized: bool, template: str) -> str:
    """The card's text: YAML front matter with `base_model`, then a Markdown summary of the training.

    Args:
        adapter: The adapter's configuration, including the name of its base.
        merged: Whether the adapter has been merged into the model's weights.
        held: How the base was stored in memory during training.
        quantized: Whether the base was quantised during training.
        template: The chat template of its records.
    """
    base = str(adapter.base_model_name_or_path)
    front_matter = ModelCardData(
        base_model=base,
        library_name="transformers" if merged else "peft",
        tags=["qlora" if quantized else "lora", "mftctl"],
    ).to_yaml()
    rows = [
        ("Rank", adapter.r),
        ("Alpha", adapter.lora_alpha),
        ("Base during training", held),
        ("Chat template", markdown_text(template)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    summary = _merged_summary(base, quantized) if merged else _adapter_summary(base, quantized)
    title = f"{markdown_text(base)}, with a {'merged ' if merged else ''}LoRA adapter"
    return (
        f"---\n{front_matter}\n---\n\n# {title}\n\n{summary}\n\n"
        f"| LoRA | |\n| --- | --- |\n{table}\n\nMade with mftctl.\n"
    )


def _adapter_summary(base: str, quantized: bool) -> str:
    text = f"This is an adapter for {markdown_code(base)}; load it with peft."
    if not quantized:
        return text
    return (
        f"{text} It was trained on that model in nf4, as recorded in `quantized_base.json`. With the model at full "
        "precision its results differ slightly; mftctl dequantises the nf4 weights before it evaluates or merges it."
    )


def _merged_summary(base: str, quantized: bool) -> str:
    text = f"This is {markdown_code(base)} with an adapter added to the weights of its attention and MLP projections."
    if not quantized:
        return text
    return (
        f"{text} Merging dequantised the model, so the weights of its linear layers are the dequantised nf4 weights "
        f"plus the adapter, exactly as trained. They differ from those of {markdown_code(base)} plus the adapter. "
        "Embeddings, norms and the output head are those of the base."
    )


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
