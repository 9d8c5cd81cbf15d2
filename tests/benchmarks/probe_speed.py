"""Compares a probe of all groups with separate runs without reuse, and mask training with and without reuse.

python -m tests.benchmarks.probe_speed MODEL DATA --group-size 4 --max-steps 4 --epochs 2 --layers 20-23
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import Result
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import create_run
from mftctl.masking.targets import format_layers, layer_groups
from mftctl.progress import Silence
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.benchmarks.timings import ratios, seconds_in_turn, spread

Workflow = Callable[..., Result]


def _run(root: Path, command: str, workflow: Workflow, recipe: Recipe) -> dict[str, Any]:
    """The result of a workflow in a new run."""
    source = ModelSource(str(recipe.model))
    run = create_run(root, command, to_document(recipe), inputs=source.as_inputs())
    run.finish(workflow(recipe, source, run, Silence()))
    return run.record.result


def _recipe(document: dict[str, Any], section: str, **changes: Any) -> Recipe:
    return parse_recipe({**document, section: {**document.get(section, {}), **changes}})


def compare(
    root: Path, model: Path, data: Path, *, group_size: int, layers: str, training: dict[str, Any], repetitions: int
) -> dict[str, str]:
    """Ratios as minimum, median and maximum; checks that both sides give the same results.

    Args:
        root: Folder to write the runs to.
        model: Checkpoint folder.
        data: Records for training and validation.
        group_size: Decoder layers per group.
        layers: Layers for mask training.
        training: Options of the `mask_train` section; one epoch unless `epochs` is given.
        repetitions: Repetitions per side.
    """
    document = {"model": str(model), "data": [str(data)], "mask_train": {"preset": "paper", **training}}
    alone = {**document, "mask_train": {**document["mask_train"], "prefix_cache_gb": 0}}
    one_pass = {"groups": [group_size], "data_fraction": 1.0, "epochs": 1.0}
    layer_count = AutoConfig.from_pretrained(model).num_hidden_layers
    groups = [format_layers(group) for group in layer_groups(layer_count, [group_size])]
    found: dict[str, dict[str, float]] = {}

    def together() -> None:
        result = _run(root, "probe", probe, _recipe(document, "probe", **one_pass))
        found["together"] = {group["layers"]: group["best_loss"] for group in result["groups"]}

    def each_alone() -> None:
        found["alone"] = {}
        for group in groups:
            recipe = _recipe(alone, "probe", layers=group, **one_pass)
            (only,) = _run(root, "probe", probe, recipe)["groups"]
            found["alone"][group] = only["best_loss"]

    def learn(name: str, source: dict[str, Any]) -> None:
        result = _run(root, "mask-train", mask_train, _recipe(source, "mask_train", layers=layers))
        found[name] = {layers: result["best_loss"]}

    ways = {
        "probe": together,
        "groups alone": each_alone,
        "reuse": partial(learn, "reuse", document),
        "no reuse": partial(learn, "no reuse", alone),
    }
    seconds = seconds_in_turn(ways, repetitions)
    for one, other in (("together", "alone"), ("reuse", "no reuse")):
        if found[one] != found[other]:
            raise SystemExit(f"{one} and {other} differ: {found[one]} and {found[other]}")
    return {
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        f"probe of {len(groups)} groups / each alone": spread(ratios(seconds["probe"], seconds["groups alone"])),
        f"mask training of layers {layers}, reuse / no reuse": spread(ratios(seconds["reuse"], seconds["no reuse"])),
    }


def main() -> None:
    """Prints the comparison for a model and a data file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--layers", required=True, help="of the mask training")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the mask training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    training = {"epochs": options.epochs, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            Path(folder),
            options.model,
            options.data,
            group_size=options.group_size,
            layers=options.layers,
            training=training,
            repetitions=options.repetitions,
        )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
