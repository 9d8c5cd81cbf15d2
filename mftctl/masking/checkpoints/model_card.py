"""The README.md of a checkpoint that a mask was applied to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from huggingface_hub import ModelCardData

from mftctl.masking.mask import Mask
from mftctl.text import markdown_code, markdown_text

_MASK_PAPER: Final = "Mask Fine-Tuning, https://arxiv.org/abs/2503.22764"
_DROP_PAPER: Final = "one-off drop, as in section 4 of https://arxiv.org/abs/2406.15330"
_DARE_PAPER: Final = "DARE, https://arxiv.org/abs/2311.03099"


def write_model_card(mask: Mask, *, base_model: str, mask_path: Path | None) -> str:
    """The card's text: YAML front matter with `base_model`, then a Markdown summary of what was removed or reset.

    Args:
        mask: The applied mask. A delta mask itself names its tuned model.
        base_model: Name or folder of the base it was applied to.
        mask_path: The mask file, whose SHA-256 the card states.
    """
    tuned_model = mask.metadata.tuned_model
    is_drop = mask.metadata.method.startswith("drop-")
    front_matter = ModelCardData(
        base_model=base_model if tuned_model is None else [base_model, tuned_model],
        library_name="transformers",
        tags=["one-off-drop" if is_drop else "mask-fine-tuning", "mftctl"],
    ).to_yaml()
    facts = [*_facts(mask)]
    if mask_path is not None:
        with mask_path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        facts.append(("Mask file (SHA-256)", f"`{digest}`"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    tensors = "\n".join(
        f"| {in_table(markdown_code(name))} | {record.weights:,} | {record.removed:,} |"
        for name, record in mask.records.items()
    )
    title = f"{markdown_text(tuned_model or base_model)}, masked"
    paper = _DROP_PAPER if is_drop else _MASK_PAPER
    if mask.metadata.scale is not None:
        paper = _DARE_PAPER
    return (
        f"---\n{front_matter}\n---\n\n# {title}\n\n{_summary(mask, base_model)}\n\n"
        f"| Mask | |\n| --- | --- |\n{rows}\n\n"
        f"| Tensor | Weights | Removed |\n| --- | ---: | ---: |\n{tensors}\n\n"
        f"Made with mftctl ({paper}).\n"
    )


def in_table(code: str) -> str:
    """Escapes vertical bars in code within a table cell, where they would end the cell.

    Args:
        code: From `markdown_code`.
    """
    return code.replace("|", "\\|")


def _summary(mask: Mask, base_model: str) -> str:
    share = f"{mask.removed:,} of {mask.weights:,} masked weights"
    if mask.metadata.tuned_model is None:
        return (
            f"This is {markdown_code(base_model)} with {share} set to zero ({mask.ratio:.2%}). "
            "All other weights are those of the base, whose model card also applies to this model."
        )
    scale = mask.metadata.scale
    kept = "" if scale is None else f"The changes of the other masked weights are multiplied by {scale:g}. "
    return (
        f"This is {markdown_code(mask.metadata.tuned_model)} with {share} reset to the values of "
        f"{markdown_code(base_model)}, from which it was tuned ({mask.ratio:.2%}). {kept}All other weights are those "
        "of the tuned model, whose model card also applies to this model."
    )


def _facts(mask: Mask) -> list[tuple[str, str]]:
    metadata = mask.metadata
    asked = {
        "Method": metadata.method,
        "Requested ratio": metadata.ratio,
        "Threshold": metadata.threshold,
        "Factor of kept changes": metadata.scale,
        "Layers": metadata.layers,
        "Seed": metadata.seed,
        "Run": metadata.run_id,
        "Learned on" if metadata.kind == "weight" else "Base": metadata.base_model,
        "Revision": metadata.base_revision,
        "Tuned": metadata.tuned_model,
        "Revision of the tuned model": metadata.tuned_revision,
    }
    known = [(name, markdown_text(str(value))) for name, value in asked.items() if value is not None]
    return [*known, ("Masked tensors", str(len(mask)))]
