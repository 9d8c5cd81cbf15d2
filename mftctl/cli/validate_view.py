"""Console output of `validate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mftctl.cli.output import pairs_table
from mftctl.cli.record_view import needs_marks, record_text, trained_on
from mftctl.text import counted

_MEMORY = {
    "weights": "weights_bytes",
    "scores": "scores_bytes",
    "masked weights": "masked_weights_bytes",
    "gradients": "gradients_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activations_bytes",
    "optimizer step": "step_bytes",
    "validation": "validation_bytes",
    "answer to a problem": "generation_bytes",
    "process": "process_bytes",
    "peak (not all at once)": "peak_bytes",
}


def validation_views(result: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables and samples to print, in reading order."""
    views: list[RenderableType] = [_overview(result)]
    marked = needs_marks()
    views += [_sample(sample, marked=marked) for sample in result["samples"]]
    views.append(_stages(result["stages"]))
    views += [_mask(names, mask) for names, mask in _alike(result["masks"].items())]
    if result["memory"]:
        views.append(_memory(result["memory"]))
    return views


def _overview(result: Mapping[str, Any]) -> Table:
    rows = []
    if model := result["model"]:
        sizes = f"{model['parameters']:,} parameters, {counted(model['layers'], 'layer')}"
        rows.append(("model", f"{model['name']}: {model['model_type']}, {sizes}"))
        template = {True: "the tokenizer's", False: "none; question and answer are concatenated", None: "unknown"}
        rows.append(("chat template", template[model["chat_template"]]))
    rows += [(name, _part(counts)) for name, counts in result["data"].items()]
    return pairs_table("Recipe", rows)


def _part(counts: Mapping[str, int]) -> str:
    text = counted(counts["records"], "record")
    if counts.get("tokenized_records"):
        text += (
            f", {counts['tokens']:,} tokens, {counts['answer_tokens']:,} of them in answers, "
            f"longest record {counts['longest_tokens']:,}"
        )
    return text


def _sample(sample: Mapping[str, Any], *, marked: bool) -> Text:
    counts = trained_on(sample["answer_tokens"], sample["tokens"], marked=marked)
    segments = ((segment["text"], segment["is_answer"]) for segment in sample["segments"])
    return record_text(f"{sample['where']}: {counts}", segments, marked=marked)


def _stages(stages: Sequence[Mapping[str, Any]]) -> Table:
    view = Table(title="Stages", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "command", "method"):
        view.add_column(name, overflow="fold")
    for name in ("records", "steps", "tokens/step", "tokens"):
        view.add_column(name, justify="right")
    for stage in stages:
        detail = stage.get("method") or (f"of {stage['of']}" if "of" in stage else "")
        counts = [stage.get(key) for key in ("records", "steps", "tokens_per_step", "tokens")]
        numbers = ["" if count is None else f"{count:,}" for count in counts]
        view.add_row(Text(stage["stage"]), stage["command"], Text(detail), *numbers)
    return view


def _mask(names: str, mask: Mapping[str, Any]) -> Table:
    """Returns a table of the weights a mask removes by projection, and its size."""
    written = mask["deflate_bytes"]
    size = f"{mask['packed_bytes']:,} bytes packed" + (f", about {written:,} in the mask file" if written else "")
    view = Table(
        title=Text(f"Mask of {names}; layers: {mask['layers']}"),
        title_justify="left",
        caption=size,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_footer=True,
    )
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for tensor in mask["tensors"]:
        projection = tensor["name"].removesuffix(".weight").rpartition(".")[2]
        groups.setdefault((projection, " × ".join(map(str, tensor["shape"]))), []).append(tensor)
    view.add_column("projection", "all")
    view.add_column("shape")
    for name, total in (("tensors", len(mask["tensors"])), ("weights", mask["weights"]), ("removed", mask["removed"])):
        view.add_column(name, _count(total), justify="right")
    for (projection, shape), tensors in groups.items():
        counts = [[tensor[key] for tensor in tensors] for key in ("weights", "removed")]
        sums = [None if None in numbers else sum(numbers) for numbers in counts]
        view.add_row(Text(projection), shape, str(len(tensors)), *map(_count, sums))
    return view


def _memory(estimates: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table with one column per estimate, headed by the stages it applies to."""
    pairs = [(item["stage"], {key: value for key, value in item.items() if key != "stage"}) for item in estimates]
    columns = _alike(pairs)
    unit, name = _unit(max(item["peak_bytes"] for item in estimates))
    free = estimates[0].get("free_bytes")
    title = f"Memory per device in {name} (the same on each device with DDP)"
    caption = "Fragmentation in the allocator needs additional memory."
    view = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    view.add_column("")
    for names, _ in columns:
        view.add_column(Text(names), justify="right", overflow="fold")
    view.add_row("largest batch", *(f"{item['records']} × {item['length_tokens']}" for _, item in columns))
    for label, key in _MEMORY.items():
        sizes = [f"{item[key] / unit:,.1f}" if item[key] else "" for _, item in columns]
        view.add_row(label, *sizes, style="bold" if key == "peak_bytes" else None)
    if free is not None:
        view.add_row("free", *(f"{free / unit:,.1f}" for _ in columns))
        view.add_row("fits", *(_FITS[item["fits"]] for _, item in columns))
        view.add_row("fits with", *(Text(item["options"] or "") for _, item in columns))
    return view


def _unit(size_bytes: int) -> tuple[float, str]:
    return (1e9, "GB") if size_bytes >= 1e10 else (1e6, "MB")


def _alike(items: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Groups equal values, each with the names of all items that have it."""
    found: list[tuple[list[str], Mapping[str, Any]]] = []
    for name, value in items:
        same = next((names for names, known in found if known == value), None)
        if same is None:
            found.append(([name], value))
        else:
            same.append(name)
    return [(", ".join(names), value) for names, value in found]


def _count(number: int | None) -> str:
    return "learned" if number is None else f"{number:,}"


_FITS = {"fits": "yes", "closely": "closely", "no": "no"}
