"""The README.md of a mask on the hub: what it is for, how to use it, and what was measured."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mftctl.errors import RunError
from mftctl.experiments.mask_results import MeasuredMask
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.masking.mask import Mask
from mftctl.reporting.reproduction import reproduction
from mftctl.text import counted, markdown_code, markdown_text

_LICENSE = "# license: choose one; the base model's licence may bind you"


def mask_card(mask: Mask, repo: str, run: Run | None) -> str:
    """The README.md of a mask: front matter, how to use it, and the facts that are known.

    Args:
        mask: The mask.
        repo: `OWNER/NAME`.
        run: The run that made it, if it is known.
    """
    metadata = mask.metadata
    tuned = metadata.tuned_model or metadata.base_model
    named: dict[str, Any] = {} if _is_local(tuned) else {"base_model": tuned}
    front = ModelCardData(library_name="mftctl", tags=["mask-fine-tuning", "mftctl"], **named).to_yaml()
    base = markdown_text("MODEL" if _is_local(tuned) else tuned)
    rows = "\n".join(f"| {name} | {value} |" for name, value in [*_facts(mask), *_measured(run)])
    return (
        f"---\n{front}\n{_LICENSE}\n---\n\n# {markdown_text(repo)}\n\n"
        f"A mask for {markdown_code(_shown(tuned))}: "
        f"{mask.removed:,} of {mask.weights:,} weights in {counted(len(mask), 'tensor')} "
        f"{'go back to their values before fine-tuning' if metadata.kind == 'delta' else 'are set to 0'} "
        f"({mask.ratio:.2%}). The weights themselves are not in this repository.\n\n"
        f"```shell\nmftctl apply {base} {repo} --output masked\n```\n\n"
        f"| Mask | |\n| --- | --- |\n{rows}\n\n"
        "Made with mftctl (Mask Fine-Tuning, https://arxiv.org/abs/2503.22764).\n"
    )


def _facts(mask: Mask) -> list[tuple[str, str]]:
    metadata = mask.metadata
    facts = {
        "Kind": metadata.kind,
        "Model before fine-tuning" if metadata.kind == "delta" else "Learned on": _shown(metadata.base_model),
        "Revision": metadata.base_revision,
        "Tuned model": None if metadata.tuned_model is None else _shown(metadata.tuned_model),
        "Revision of the tuned model": metadata.tuned_revision,
        "Method": metadata.method,
        "Threshold": metadata.threshold,
        "Layers": metadata.layers,
        "Seed": metadata.seed,
    }
    found = [(name, markdown_text(str(value))) for name, value in facts.items() if value is not None]
    digests = [record.tuned_sha256 or record.sha256 for record in mask.records.values()]
    return [*found, ("First tensor it fits (SHA-256)", f"`{digests[0]}`")]


def _measured(run: Run | None) -> list[tuple[str, str]]:
    """What the run that made the mask measured, its data and its command."""
    if run is None or run.record.command != "mask-train":
        return []
    found = [("Data", markdown_text(", ".join(_data_names(run.record.config.get("data")))))]
    inputs = RunInputs.read(run.record.inputs)
    if inputs.train_records is not None:
        found.append(("Training records", f"{inputs.train_records:,}"))
    result = run.result(Outcome)
    if result.unmasked_loss is not None and result.best_loss is not None:
        losses = f"{result.unmasked_loss:.4f} without the mask, {result.best_loss:.4f} with it"
        found.append(("Validation loss", losses))
    confirmation = run.result(MeasuredMask).confirmation if result.unmasked_loss is not None else None
    if confirmation is not None:
        change = f"{confirmation.change:+.4f} [{confirmation.low:+.4f}, {confirmation.high:+.4f}]"
        found.append((f"Change on {confirmation.records} other validation records", f"{change} (paired 95 % interval)"))
    with suppress(RunError):  # an incomplete record: the card does without the command
        found.append(("Command", markdown_code(reproduction(run))))
    return found


def _data_names(sources: object) -> list[str]:
    """The data by hub id or file name, without the folders of this machine."""
    parts = sources if isinstance(sources, list) else []
    names = [str(part.get("path", "")) if isinstance(part, dict) else str(part) for part in parts]
    return list(map(_shown, names))


def _shown(name: str) -> str:
    """A hub id, or the last part of a path on this machine."""
    return Path(name).name if _is_local(name) else name


def _is_local(name: str) -> bool:
    return name == "quickstart" or Path(name).expanduser().exists() or name.startswith(("/", ".", "~"))


def run_of_mask(file: Path, root: Path) -> Run | None:
    """The run that made a mask file; None if it is not in the runs folder."""
    for run in reversed(list_runs(root)[0] if root.is_dir() else []):
        made = run.result(Outcome)
        if any(place is not None and Path(place).resolve() == file.resolve() for place in (made.mask, made.output)):
            return run
    return None
