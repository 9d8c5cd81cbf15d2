"""Console output of `validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mftctl.cli.output import pairs_table
from mftctl.cli.record_view import needs_marks, record_text, trained_on
from mftctl.text import counted

if TYPE_CHECKING:
    from mftctl.workflows.planning.mask_sizes import MaskedTensor, MaskEstimate
    from mftctl.workflows.planning.memory import MemoryEstimate
    from mftctl.workflows.planning.planned_stages import PlannedStage, StageMemory
    from mftctl.workflows.validate import PartCounts, Sample, Validation

_Item = TypeVar("_Item")

_PEAK = "peak (not all at once)"
_MEMORY: dict[str, Callable[[MemoryEstimate], int]] = {
    "weights": lambda need: need.weights_bytes,
    "scores": lambda need: need.scores_bytes,
    "masked weights": lambda need: need.masked_weights_bytes,
    "gradients": lambda need: need.gradients_bytes,
    "optimizer": lambda need: need.optimizer_bytes,
    "activations": lambda need: need.activations_bytes,
    "optimizer step": lambda need: need.step_bytes,
    "validation": lambda need: need.validation_bytes,
    "answer to a problem": lambda need: need.generation_bytes,
    "process": lambda need: need.process_bytes,
    _PEAK: lambda need: need.peak_bytes,
}


def validation_views(result: Validation) -> list[RenderableType]:
    """Returns the tables and samples to print, in reading order."""
    views: list[RenderableType] = [_overview(result)]
    marked = needs_marks()
    views += [_sample(sample, marked=marked) for sample in result.samples]
    views.append(_stages(result.stages))
    views += [_mask(names, mask) for names, mask in _alike(result.masks.items())]
    if result.memory:
        views.append(_memory(result.memory))
    return views


def _overview(result: Validation) -> Table:
    rows = []
    if model := result.model:
        sizes = f"{model.parameters:,} parameters, {counted(model.layers, 'layer')}"
        rows.append(("model", f"{model.name}: {model.model_type}, {sizes}"))
        template = {True: "the tokenizer's", False: "none; question and answer are concatenated", None: "unknown"}
        rows.append(("chat template", template[model.chat_template]))
    rows += [(name.replace("_", " "), _part(counts)) for name, counts in result.data.items()]
    return pairs_table("Recipe", rows)


def _part(counts: PartCounts) -> str:
    text = counted(counts.records, "record")
    if tokens := counts.tokens:
        text += (
            f", {tokens.tokens:,} tokens, {tokens.answer_tokens:,} of them in answers, "
            f"longest record {tokens.longest_tokens:,}"
        )
    return text


def _sample(sample: Sample, *, marked: bool) -> Text:
    counts = trained_on(sample.answer_tokens, sample.tokens, marked=marked)
    segments = ((segment.text, segment.is_answer) for segment in sample.segments)
    return record_text(f"{sample.where}: {counts}", segments, marked=marked)


def _stages(stages: Sequence[PlannedStage]) -> Table:
    view = Table(title="Stages", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "command", "method"):
        view.add_column(name, overflow="fold")
    for name in ("records", "steps", "tokens/step", "tokens"):
        view.add_column(name, justify="right")
    for stage in stages:
        detail = stage.method or (f"of {stage.of}" if stage.of is not None else "")
        counts = [stage.records, stage.steps, stage.tokens_per_step, stage.tokens]
        numbers = ["" if count is None else f"{count:,}" for count in counts]
        view.add_row(Text(stage.stage), stage.command, Text(detail), *numbers)
    return view


def _mask(names: str, mask: MaskEstimate) -> Table:
    """Returns a table of the weights a mask removes by projection, and its size."""
    written = mask.deflate_bytes
    size = f"{mask.packed_bytes:,} bytes packed" + (f", about {written:,} in the mask file" if written else "")
    view = Table(
        title=Text(f"Mask of {names}; layers: {mask.layers}"),
        title_justify="left",
        caption=size,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_footer=True,
    )
    groups: dict[tuple[str, str], list[MaskedTensor]] = {}
    for tensor in mask.tensors:
        projection = tensor.name.removesuffix(".weight").rpartition(".")[2]
        groups.setdefault((projection, " × ".join(map(str, tensor.shape))), []).append(tensor)
    view.add_column("projection", "all")
    view.add_column("shape")
    for name, total in (("tensors", len(mask.tensors)), ("weights", mask.weights), ("removed", mask.removed)):
        view.add_column(name, _count(total), justify="right")
    for (projection, shape), tensors in groups.items():
        part = replace(mask, tensors=tuple(tensors))
        view.add_row(Text(projection), shape, str(len(tensors)), _count(part.weights), _count(part.removed))
    return view


def _memory(memory: Sequence[StageMemory]) -> Table:
    """Returns a table with one column per estimate, headed by the stages it applies to."""
    from mftctl.workflows.planning.room import Verdict

    columns = _alike((item.stage, replace(item, stage="")) for item in memory)
    unit, name = _unit(max(item.estimate.peak_bytes for item in memory))
    title = f"Memory per device in {name} (the same on each device with DDP)"
    caption = "Fragmentation in the allocator needs additional memory."
    view = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    view.add_column("")
    for names, _ in columns:
        view.add_column(Text(names), justify="right", overflow="fold")
    view.add_row("largest batch", *(f"{item.records} × {item.length_tokens}" for _, item in columns))
    for label, part in _MEMORY.items():
        sizes = [f"{size / unit:,.1f}" if (size := part(item.estimate)) else "" for _, item in columns]
        view.add_row(label, *sizes, style="bold" if label == _PEAK else None)
    rooms = [item.room for _, item in columns if item.room is not None]
    if rooms:
        view.add_row("free", *(f"{room.free_bytes / unit:,.1f}" for room in rooms))
        view.add_row("fits", *("yes" if room.fits is Verdict.FITS else room.fits.value for room in rooms))
        view.add_row("fits with", *(Text(room.options or "") for room in rooms))
    return view


def _unit(size_bytes: int) -> tuple[float, str]:
    return (1e9, "GB") if size_bytes >= 1e10 else (1e6, "MB")


def _alike(items: Iterable[tuple[str, _Item]]) -> list[tuple[str, _Item]]:
    """Groups equal values, each with the names of all items that have it."""
    found: list[tuple[list[str], _Item]] = []
    for name, value in items:
        same = next((names for names, known in found if known == value), None)
        if same is None:
            found.append(([name], value))
        else:
            same.append(name)
    return [(", ".join(names), value) for names, value in found]


def _count(number: int | None) -> str:
    return "learned" if number is None else f"{number:,}"
