"""The README.md of a LoRA adapter, or of the model it was merged into."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from peft import LoraConfig

from mftctl.text import markdown_code, markdown_text


def write_lora_card(adapter: LoraConfig, *, merged: bool, held: str, quantized: bool, template: str) -> str:
    """The text of the card: YAML front matter with `base_model`, then what was trained on what, as Markdown.

    Args:
        adapter: With the name of its base.
        merged: Whether it is in the model's weights by now.
        held: How the base was held in memory while the adapter was trained.
        quantized: Whether that was in fewer bits than it is stored in, from which it was dequantised.
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
        ("Base while training", held),
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
        f"{text} It was trained on that model in nf4, as `quantized_base.json` says. On the model at full precision it "
        "is not quite the one that was trained: mftctl dequantises the nf4 weights before it measures or merges it."
    )


def _merged_summary(base: str, quantized: bool) -> str:
    text = f"This is {markdown_code(base)} with an adapter added to the weights of its attention and MLP projections."
    if not quantized:
        return text
    return (
        f"{text} Merging dequantised the model: the weights of its linear layers are those that nf4 stands for, plus "
        f"the adapter, which is the model that was trained. They are not those of {markdown_code(base)} plus the "
        "adapter. Embeddings, norms and the output head are those of the base."
    )


def write_tuned_card(state: str, *, base: str, template: str) -> str:
    """The text of the card: YAML front matter with `base_model`, then what was done to it, as Markdown.

    Args:
        state: What fine-tuning made of the model, such as `FFT` or `continued GMT`.
        base: Name or folder of the model that it started from.
        template: The chat template of its records, which is in the tokenizer.
    """
    front_matter = ModelCardData(base_model=base, library_name="transformers", tags=["fine-tuned", "mftctl"]).to_yaml()
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(base)}, fine-tuned\n\n"
        f"This is {markdown_code(base)} after {markdown_text(state)}.\n\n"
        f"| Fine-tuning | |\n| --- | --- |\n| Method | {markdown_text(state)} |\n"
        f"| Chat template | {markdown_text(template)} |\n\nMade with mftctl.\n"
    )
