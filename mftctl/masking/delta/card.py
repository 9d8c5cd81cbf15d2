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
    "scale": "multipliers in 8 bits",
}


def write_delta_card(delta: Delta, *, base_model: str) -> str:
    """The card's text: YAML front matter with `base_model`, then how much of the fine-tuning the file kept.

    Args:
        delta: The applied delta.
        base_model: Name or folder of the base it was applied to.
    """
    metadata, is_soft = delta.contents.metadata, delta.contents.metadata.kind == "scale"
    kind = "soft-mask" if is_soft else "delta"
    front_matter = ModelCardData(base_model=base_model, library_name="transformers", tags=[kind, "mftctl"]).to_yaml()
    tuned = ", ".join(markdown_code(model.model) for model in metadata.tuned)
    title = f"{base_model}, with a soft mask" if is_soft else f"{metadata.tuned[0].model}, from a delta file"
    records = delta.contents.tensors.values()
    numbers = f"{sum(record.kept for record in records):,} of {sum(record.weights for record in records):,} weights"
    done = (
        f"with {numbers} multiplied by the numbers of a soft mask"
        if is_soft
        else f"with the changes that fine-tuning it to {tuned} made to {numbers}"
    )
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(title)}\n\n"
        f"This is {markdown_code(base_model)} {done}. All other weights are those of the base, whose model card also "
        "applies to this model.\n\n"
        f"| {'Soft mask' if is_soft else 'Delta'} | |\n| --- | --- |\n{_facts(delta)}\n\n"
        f"| Tensor | Weights | Changed |\n| --- | ---: | ---: |\n{_tensors(delta)}\n\nMade with mftctl.\n"
    )


def _facts(delta: Delta) -> str:
    """The rows of the table of facts."""
    metadata = delta.contents.metadata
    with delta.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    file = "Soft mask" if metadata.kind == "scale" else "Delta file"
    facts = {
        "Fine-tuned": ", ".join(model.label for model in metadata.tuned) or None,
        "Selection": metadata.method,
        "Requested ratio": metadata.ratio,
        "Values": VALUES_TEXT[metadata.values],
        "Factor of kept changes": metadata.scale,
        "Seed": metadata.seed,
        "Run": metadata.run_id,
        f"{file}, bytes": f"{delta.size_bytes:,}",
    }
    rows = [(name, markdown_text(str(value))) for name, value in facts.items() if value is not None]
    rows += [(f"{file} (SHA-256)", f"`{digest}`")]
    rows += [
        ("Changes left out", f"{in_table(markdown_code(name))} ({one.reason})")
        for name, one in delta.contents.left_out.items()
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _tensors(delta: Delta) -> str:
    """The rows of the table of tensors."""
    return "\n".join(
        f"| {in_table(markdown_code(name))} | {record.weights:,} | {record.kept:,} |"
        for name, record in delta.contents.tensors.items()
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
