"""Draws bytes against gain and forgetting from the runs of a recipe such as quickstart/delta.

    mftctl run quickstart/delta --set "seeds=[0,1,2]"
    python scripts/small_files.py --runs runs --output small-files

Adds low-rank approximations of each matrix's change, as mergekit extracts a LoRA. They are no command of mftctl: each
is written as a checkpoint and measured as by `mftctl eval`, in a runs folder of its own. Writes small-files.md and
small-files.png.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mftctl.api import evaluate
from mftctl.data.retained import RETAINED
from mftctl.experiments.combined_results import KeptDelta
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.experiments.results import EvalResult, FftResult, MadeModel
from mftctl.experiments.run_folder import Run, list_runs, load_run
from mftctl.experiments.run_inputs import Parents
from mftctl.masking.checkpoints.companions import copy_companions
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.checkpoints.tensors import WEIGHTS_FILE, tensor_index

BF16_BYTES = 2
RANKED = re.compile(r"^(?P<name>[a-z-]+?)(?P<number>\d+)?(?:\[(?:ratio|values)=(?P<value>[^\]]+)\])?$")
FAMILIES = {
    "largest": "largest changes, int8",
    "dare": "random, rescaled (DARE), int8",
    "learned": "learned delta mask, int8",
    "fisher": "Fisher, int8",
    "signs": "largest changes, signs",
    "bitdelta": "all signs (BitDelta)",
    "rounded": "all changes, rounded",
    "whole": "all changes, exact",
    "low-rank": "low-rank change (SVD)",
    "lora": "LoRA",
    "gmt-whole": "GMT, exact",
    "hft-whole": "HFT, exact",
}


@dataclass(frozen=True)
class Losses:
    """Loss on the model's own domain, and on the second one."""

    own: float
    second: float


@dataclass(frozen=True)
class Point:
    """One state, averaged over seeds.

    Attributes:
        family: What it is a variant of.
        variant: Its ratio, kind of values or rank.
        share: Bytes as a share of the checkpoint's.
        gains: For each seed, the share of the fine-tuning's gain on its own domain.
        forgotten: For each seed, the share of the fine-tuning's change of the loss on the second domain.
        forgets: Whether that change is a rise.
    """

    family: str
    variant: str
    share: float
    gains: tuple[float, ...]
    forgotten: tuple[float, ...]
    forgets: bool


def losses_of(run: Run) -> Losses:
    """The losses that an evaluation measured."""
    found = {
        dataset.name == RETAINED: metric.value
        for dataset in run.result(EvalResult).datasets
        for metric in dataset.metrics
        if metric.name == "loss"
    }
    return Losses(found[False], found[True])


def adapter_bytes(folder: Path) -> int:
    """The bytes of an adapter's weights in bf16."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as reader:
        entries = sum(int(reader.get_tensor(name).numel()) for name in list(reader.keys()))
    return BF16_BYTES * entries


def stored_bytes(made_by: Run) -> int:
    """The bytes of what a run made: a delta file or an adapter, also one merged into its model."""
    if made_by.record.command == "delta":
        return made_by.result(KeptDelta).file_bytes
    folder = Path(made_by.result(MadeModel).model)
    if is_adapter(folder):
        return adapter_bytes(folder)
    if made_by.record.command == "fft" and made_by.record.config["fft"]["method"] == "lora":
        return BF16_BYTES * made_by.result(FftResult).trained_parameters
    return sum(stored.length_bytes for stored in tensor_index(folder).values())


def write_low_rank(base: Path, tuned: Path, rank: int, output: Path) -> int:
    """Writes the base with the best approximation of that rank of each matrix's change; returns the factors' bytes.

    Vectors keep their fine-tuned values. Factors are rounded to bf16, as they would be stored.
    """
    before, after = load_file(base / WEIGHTS_FILE), load_file(tuned / WEIGHTS_FILE)
    stored, tensors = 0, {}
    for name, weight in before.items():
        if weight.dim() < 2:
            tensors[name], stored = after[name], stored + BF16_BYTES * weight.numel()
            continue
        left, sizes, right = torch.linalg.svd(after[name].float() - weight.float(), full_matrices=False)
        roots = sizes[:rank].sqrt()
        factors = [(left[:, :rank] * roots).bfloat16(), (roots[:, None] * right[:rank]).bfloat16()]
        stored += BF16_BYTES * sum(factor.numel() for factor in factors)
        tensors[name] = (weight.float() + factors[0].float() @ factors[1].float()).to(weight.dtype)
    output.mkdir(parents=True)
    save_file(tensors, output / WEIGHTS_FILE, {"format": "pt"})
    copy_companions(tuned.resolve(), output, sharded=False)
    return stored


def low_rank_points(
    evaluations: Mapping[int, Mapping[str, Run]], root: Path, ranks: Iterable[int], folder: Path
) -> dict[tuple[str, str], dict[int, tuple[int, Losses]]]:
    """Bytes and losses of low-rank changes by name and seed; those measured before are read from their runs."""
    found: dict[tuple[str, str], dict[int, tuple[int, Losses]]] = {}
    for seed, states in evaluations.items():
        config = states["fft"].record.config
        tuned = Path(load_run(root / Parents.read(states["fft"].record.inputs).parents[-1]).result(MadeModel).model)
        base = resolve_checkpoint(str(states["pretrained"].record.config["model"]))
        for rank in ranks:
            model, size = folder / f"seed-{seed}-rank-{rank}", folder / f"seed-{seed}-rank-{rank}.bytes"
            runs = folder / f"runs-{seed}-{rank}"
            if not size.is_file():
                size.write_text(str(write_low_rank(base, tuned, rank, model)))
            measured = list_runs(runs)[0] if runs.is_dir() else []
            if not measured:
                recipe = with_changes(parse_recipe(config), {"model": str(model)})
                measured = [load_run(evaluate(recipe, runs=runs).folder)]
            entry = int(size.read_text()), losses_of(measured[-1])
            found.setdefault(("low-rank", str(rank)), {})[seed] = entry
    return found


def points_of(root: Path, ranks: Iterable[int], folder: Path) -> list[Point]:
    """All states of the recipe with their bytes, gains and forgetting, and the low-rank changes."""
    evaluations: dict[int, dict[str, Run]] = {}
    for run in list_runs(root)[0]:
        if run.record.command == "eval" and run.record.status == "finished" and run.record.stage:
            evaluations.setdefault(run.record.config["seed"], {})[run.record.stage] = run
    evaluations = {seed: states for seed, states in evaluations.items() if {"pretrained", "fft"} <= set(states)}
    found = low_rank_points(evaluations, root, ranks, folder)
    for seed, states in evaluations.items():
        for label, run in states.items():
            match = RANKED.match(label)
            if match is None or match["name"] not in FAMILIES:
                continue
            made_by = load_run(root / Parents.read(run.record.inputs).parents[-1])
            key = match["name"], match["value"] or match["number"] or ""
            found.setdefault(key, {})[seed] = stored_bytes(made_by), losses_of(run)
    base = resolve_checkpoint(str(next(iter(evaluations.values()))["pretrained"].record.config["model"]))
    checkpoint_bytes = sum(stored.length_bytes for stored in tensor_index(base).values())
    points = []
    for (family, variant), by_seed in found.items():
        gains, forgotten, rises = [], [], []
        for seed, (_, losses) in by_seed.items():
            before, after = losses_of(evaluations[seed]["pretrained"]), losses_of(evaluations[seed]["fft"])
            gains.append((before.own - losses.own) / (before.own - after.own))
            forgotten.append((losses.second - before.second) / (after.second - before.second))
            rises.append(after.second - before.second)
        share = fmean(size for size, _ in by_seed.values()) / checkpoint_bytes
        points.append(Point(family, variant, share, tuple(gains), tuple(forgotten), fmean(rises) > 0))
    order = list(FAMILIES)
    return sorted(points, key=lambda point: (order.index(point.family), -point.share))


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table: means over seeds, with the lowest and highest."""
    second = "forgotten" if points[0].forgets else "gain of the second domain kept"
    lines = [f"| stored | variant | bytes | gain kept | {second} |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {FAMILIES[one.family]} | {one.variant} | {one.share:.1%} | {spread(one.gains)} | {spread(one.forgotten)} |"
        for one in points
    ]
    return "\n".join(lines) + "\n"


def spread(values: tuple[float, ...]) -> str:
    """The mean, with the lowest and highest if they differ."""
    around = f" [{min(values):.1%}, {max(values):.1%}]" if len(values) > 1 else ""
    return f"{fmean(values):.1%}{around}"


def draw(points: list[Point], path: Path) -> None:
    """Two panels: share of the gain kept and of the change on the second domain, both against bytes."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    second = "share forgotten" if points[0].forgets else "share of the second domain's gain kept"
    for place, (title, key) in enumerate((("share of the gain kept", "gains"), (second, "forgotten"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, family in enumerate(FAMILIES):
            mine = sorted((one for one in points if one.family == family), key=lambda one: one.share)
            if not mine:
                continue
            means = [fmean(getattr(one, key)) for one in mine]
            errors = [
                [mean - min(getattr(one, key)) for one, mean in zip(mine, means, strict=True)],
                [max(getattr(one, key)) - mean for one, mean in zip(mine, means, strict=True)],
            ]
            shares = [100 * one.share for one in mine]
            label = FAMILIES[family] if place == 0 else None
            colour = f"C{number}" if number < 10 else ("black", "grey")[number - 10]
            axes.errorbar(
                shares, means, errors, marker="osv^DPX*<>dp"[number], color=colour, label=label, markersize=4, capsize=2
            )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="bytes, % of the checkpoint", title=title)
        axes.set_xticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
        axes.set_xticks((), minor=True)
        axes.set_ylim(*((0.2, 1.1) if key == "gains" else (-0.1, 1.6)))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("small-files"))
    parser.add_argument("--ranks", default="1,2,4,8,16")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    points = points_of(options.runs, ranks, options.output / "low-rank")
    (options.output / "small-files.md").write_text(table(points), encoding="utf-8")
    draw(points, options.output / "small-files.png")
    print(table(points))


if __name__ == "__main__":
    main()
