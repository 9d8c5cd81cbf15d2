"""The README.md of a checkpoint that a mask was applied to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import ModelCardData

from mftctl.masking.bits import Mask


def write_model_card(mask: Mask, *, base_model: str, mask_path: Path | None) -> str:
    """The text of the card: YAML front matter with `base_model`, then what was removed, as Markdown.

    Args:
        mask: The mask that was applied.
        base_model: Name or folder of the model it was applied to.
        mask_path: The mask file, whose SHA-256 the card states.
    """
    front_matter = ModelCardData(
        base_model=base_model, library_name="transformers", tags=["mask-fine-tuning", "mftctl"]
    ).to_yaml()
    facts = [*_facts(mask)]
    if mask_path is not None:
        with mask_path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        facts.append(("Mask file (SHA-256)", f"`{digest}`"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    tensors = "\n".join(
        f"| `{name}` | {record.weights:,} | {record.removed:,} |" for name, record in mask.records.items()
    )
    return (
        f"---\n{front_matter}\n---\n\n# {base_model}, masked\n\n"
        f"This is `{base_model}` with {mask.removed:,} of {mask.weights:,} masked weights set to zero "
        f"({mask.ratio:.2%}). All other weights are those of the base, whose own card also holds for this model.\n\n"
        f"| Mask | |\n| --- | --- |\n{rows}\n\n"
        f"| Tensor | Weights | Removed |\n| --- | ---: | ---: |\n{tensors}\n\n"
        "Made with mftctl (Mask Fine-Tuning, https://arxiv.org/abs/2503.22764).\n"
    )


def _facts(mask: Mask) -> list[tuple[str, str]]:
    metadata = mask.metadata
    asked = {
        "Method": metadata.method,
        "Ratio asked for": metadata.ratio,
        "Threshold": metadata.threshold,
        "Layers": metadata.layers,
        "Seed": metadata.seed,
        "Run": metadata.run_id,
        "Learned on": metadata.base_model,
        "Revision": metadata.base_revision,
    }
    known = [(name, str(value)) for name, value in asked.items() if value is not None]
    return [*known, ("Masked tensors", str(len(mask)))]
