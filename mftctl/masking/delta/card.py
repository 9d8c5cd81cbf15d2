"""The README.md of a checkpoint that a delta file was applied to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from huggingface_hub import ModelCardData

from mftctl.masking.checkpoints.model_card import in_table
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.values import ValuesKind
from mftctl.text import markdown_code, markdown_text

_TIES_PAPER = "TIES, https://arxiv.org/abs/2306.01708"
_ARITHMETIC_PAPER = "task arithmetic, https://arxiv.org/abs/2212.04089"

VALUES_TEXT: dict[ValuesKind, str] = {
    "exact": "exact",
    "bf16": "changes in bf16",
    "int8": "changes in 8 bits",
    "sign": "signs, with one scale per tensor",
}


def write_delta_card(delta: Delta, *, base_model: str) -> str:
    """The card's text: YAML front matter with `base_model`, then how much of the fine-tuning the file kept.

    Args:
        delta: The applied delta.
        base_model: Name or folder of the base it was applied to.
    """
    contents, metadata = delta.contents, delta.contents.metadata
    tuned = [model.model for model in metadata.tuned]
    front_matter = ModelCardData(base_model=base_model, library_name="transformers", tags=["delta", "mftctl"]).to_yaml()
    with delta.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = {
        "Fine-tuned": ", ".join(model.label for model in metadata.tuned),
        "Selection": metadata.method,
        "Requested ratio": metadata.ratio,
        "Values": VALUES_TEXT[metadata.values],
        "Factor of kept changes": metadata.scale,
        "Seed": metadata.seed,
        "Run": metadata.run_id,
        "Delta file, bytes": f"{delta.size_bytes:,}",
    }
    rows = [(name, markdown_text(str(value))) for name, value in facts.items() if value is not None]
    rows += [("Delta file (SHA-256)", f"`{digest}`")]
    rows += [
        ("Changes left out", f"{in_table(markdown_code(name))} ({one.reason})")
        for name, one in contents.left_out.items()
    ]
    kept = sum(record.kept for record in contents.tensors.values())
    weights = sum(record.weights for record in contents.tensors.values())
    tensors = "\n".join(
        f"| {in_table(markdown_code(name))} | {record.weights:,} | {record.kept:,} |"
        for name, record in contents.tensors.items()
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(tuned[0])}, from a delta file\n\n"
        f"This is {markdown_code(base_model)} with the changes that fine-tuning it to "
        f"{', '.join(map(markdown_code, tuned))} made to {kept:,} of {weights:,} weights. All other weights are those "
        "of the base, whose model card also applies to this model.\n\n"
        f"| Delta | |\n| --- | --- |\n{table}\n\n"
        f"| Tensor | Weights | Changed |\n| --- | ---: | ---: |\n{tensors}\n\nMade with mftctl.\n"
    )


def write_merge_card(deltas: Sequence[Delta], method: str, *, base_model: str) -> str:
    """The card's text for the changes of several deltas merged onto their base.

    Args:
        deltas: The deltas.
        method: How they were merged, with weights and scale.
        base_model: Name or folder of the base.
    """
    front_matter = ModelCardData(
        base_model=base_model, library_name="transformers", tags=["delta", "merge", "mftctl"]
    ).to_yaml()
    rows = "\n".join(
        f"| {in_table(markdown_code(model.label))} | {VALUES_TEXT[delta.contents.metadata.values]} "
        f"| {sum(record.kept for record in delta.contents.tensors.values()):,} |"
        for delta in deltas
        for model in delta.contents.metadata.tuned
    )
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(base_model)}, merged\n\n"
        f"This is {markdown_code(base_model)} with the changes that {len(deltas)} fine-tunings made to it, merged "
        f"({markdown_text(method)}). Files that go with the weights are those of the first fine-tuning that changed "
        "them.\n\n"
        f"| Fine-tuned | Values | Changed weights |\n| --- | --- | ---: |\n{rows}\n\n"
        f"Made with mftctl ({_TIES_PAPER if method.startswith('ties') else _ARITHMETIC_PAPER}).\n"
    )
