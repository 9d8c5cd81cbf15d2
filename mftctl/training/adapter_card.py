"""Model cards (README.md) of adapters and of models with an adapter merged."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftConfig, ShiraConfig

from mftctl.text import markdown_code, markdown_text


def write_adapter_card(
    adapter: PeftConfig, *, trained: int, mask: str | None, merged: bool, held: str, quantized: bool, template: str
) -> str:
    """The card's text: YAML front matter with `base_model`, then a Markdown summary of the training.

    Args:
        adapter: The configuration of a LoRA, SHiRA or Super-Tuning adapter, including the name of its base.
        trained: Number of trained parameters.
        mask: For SHiRA and Super-Tuning, the mask that chose the weights; None without one.
        merged: Whether the adapter has been merged into the model's weights.
        held: How the base was stored in memory during training.
        quantized: Whether the base was quantised during training.
        template: The chat template of its records.
    """
    base, name = str(adapter.base_model_name_or_path), _name(adapter)
    front_matter = ModelCardData(
        base_model=base,
        library_name="transformers" if merged else "peft",
        tags=["qlora" if quantized else name.lower(), "mftctl"],
    ).to_yaml()
    rows = [
        *_rows(adapter, trained, mask),
        ("Base during training", held),
        ("Chat template", markdown_text(template)),
    ]
    table = "\n".join(f"| {row} | {value} |" for row, value in rows)
    summary = _merged_summary(base, quantized) if merged else _adapter_summary(base, quantized)
    title = f"{markdown_text(base)}, with a {'merged ' if merged else ''}{name} adapter"
    return (
        f"---\n{front_matter}\n---\n\n# {title}\n\n{summary}\n\n"
        f"| {name} | |\n| --- | --- |\n{table}\n\nMade with mftctl.\n"
    )


def _name(adapter: PeftConfig) -> str:
    if isinstance(adapter, LoraConfig):
        return "LoRA"
    return "SHiRA" if isinstance(adapter, ShiraConfig) else "Super-Tuning"


def _rows(adapter: PeftConfig, trained: int, mask: str | None) -> list[tuple[str, object]]:
    if isinstance(adapter, LoraConfig):
        experts = [("Experts", "adapted too")] if adapter.target_parameters else []
        return [("Rank", adapter.r), ("Alpha", adapter.lora_alpha), *experts]
    chosen = "random" if isinstance(adapter, ShiraConfig) else "the largest"
    return [("Trained weights", f"{trained:,}, {chosen if mask is None else f'kept by {markdown_code(mask)}'}")]


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
