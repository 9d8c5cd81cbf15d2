"""Checks whether an estimate fits the available memory, and finds options with which it does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.targets import format_layers
from mftctl.training.schedule import records_per_step, smaller_batch_sizes
from mftctl.workflows.planning.memory import MemoryEstimate

SPARE_SHARE = 0.05
"""Share of the available memory kept free, since allocators lose some."""

STOPPING_SHARE = 0.85
"""Share of an estimate: a command is stopped if not even this much fits. Estimates are more accurate than that."""


class Verdict(StrEnum):
    """Result of comparing an estimate with the available memory."""

    FITS = "fits"
    CLOSELY = "closely"
    NO = "no"


def judge(needed_bytes: int, free_bytes: int) -> Verdict:
    """Returns whether an estimate fits the free memory; anything that may fit is not called too large.

    Args:
        needed_bytes: Estimated memory.
        free_bytes: Available memory.
    """
    if needed_bytes <= (1 - SPARE_SHARE) * free_bytes:
        return Verdict.FITS
    return Verdict.CLOSELY if STOPPING_SHARE * needed_bytes <= free_bytes else Verdict.NO


@dataclass(frozen=True, slots=True)
class Change:
    """A recipe change that saves memory.

    Attributes:
        flags: The change as command options.
        keys: The change as dotted recipe keys.
    """

    flags: str = ""
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> str:
        """The change as `--set` options for `run`."""
        return " ".join(f"--set {shlex.quote(f'{key}={_value(value)}')}" for key, value in self.keys.items())


def _value(value: Any) -> str:
    """The value in YAML form."""
    return json.dumps(value, separators=(",", ":")).strip('"')


@dataclass(frozen=True, slots=True)
class Smaller:
    """The smallest set of option changes that makes a command fit.

    Attributes:
        flags: The changes as command options.
        sets: The changes as `--set` options for `run`.
        needed_bytes: Estimated memory with the changes.
    """

    flags: str
    sets: str
    needed_bytes: int


def smallest_options(
    command: str,
    recipe: Recipe,
    *,
    fits: Callable[[Recipe], bool],
    estimate: Callable[[Recipe], MemoryEstimate],
    layers: Sequence[int] = (),
) -> Smaller | None:
    """Returns the cheapest option changes that make a command fit; None if there are none.

    Changes are tried in order of cost: smaller batches, which cost only time, then recomputed activations, lower
    precision, and finally a different method or fewer layers.

    Args:
        command: The command.
        recipe: The current recipe.
        fits: Tests whether a recipe fits; may be called with smaller savings after larger ones.
        estimate: Estimates the memory of a recipe that fits.
        layers: Masked layers, if the command can change them.
    """
    axes = [
        [change for change in axis if _changed(recipe, [change]) is not None] for axis in _axes(command, recipe, layers)
    ]
    chosen = _search(recipe, [], axes, fits)
    if chosen is None:
        return None
    changed = _changed(recipe, chosen)
    needed = estimate(changed).peak_bytes if changed is not None else 0
    parts = [change for change in reversed(chosen) if change.keys]
    return Smaller(" ".join(part.flags for part in parts), " ".join(part.sets for part in parts), needed)


def _search(
    recipe: Recipe, chosen: list[Change], rest: list[list[Change]], fits: Callable[[Recipe], bool]
) -> list[Change] | None:
    """The first choice on each axis that makes the recipe fit, most expensive axes first."""
    most = _changed(recipe, [*chosen, *(axis[-1] for axis in rest)])
    if most is None or not fits(most):
        return None
    if not rest:
        return chosen
    for change in rest[0]:
        found = _search(recipe, [*chosen, change], rest[1:], fits)
        if found is not None:
            return found
    return None


def _changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe | None:
    """The recipe with changes; None if they are incompatible."""
    keys = {key: value for change in changes for key, value in change.keys.items()}
    try:
        return with_changes(recipe, keys)
    except ConfigError:
        return None


def _axes(command: str, recipe: Recipe, layers: Sequence[int]) -> list[list[Change]]:
    """The possible changes, most expensive axis first, each ordered from no change to the largest saving."""
    as_it_is = Change()
    if command == "fft":
        return [[as_it_is, *_methods(recipe.fft)], *_training_axes("fft", recipe.fft)]
    if command == "interpolate":
        return []
    if command == "eval":
        return [_evaluation_axis(recipe), [as_it_is, *_single(recipe)]]
    options = recipe.mask_train
    fewer = [as_it_is, *_fewer_layers(layers)]
    if command == "probe":
        fewer = [as_it_is, *_smaller_groups(recipe)]
    low = [as_it_is]
    if not options.low_memory and options.method == "learned" and not (command == "probe" and recipe.probe.fast):
        low.append(Change("--low-memory", {"mask_train.low_memory": True}))
    training = _training_axes("mask_train", options)
    if command == "probe":  # probe has no options of its own for these
        training = [[Change(change.sets, change.keys) for change in axis] for axis in training]
    return [fewer, low, *training]


def _training_axes(section: str, options: TrainingOptions) -> list[list[Change]]:
    """Averages in main memory, recomputed activations and smaller batches."""
    averages = [Change()]
    if options.average != "none" and options.average_device == "device":
        averages.append(Change("--average-device cpu", {f"{section}.average_device": "cpu"}))
    checkpointing = [Change()]
    if not options.gradient_checkpointing:
        checkpointing.append(Change("--gradient-checkpointing", {f"{section}.gradient_checkpointing": True}))
    return [checkpointing, averages, [Change(), *_smaller_batches(section, options)]]


def _smaller_batches(section: str, options: TrainingOptions) -> list[Change]:
    """Successively halved batches with the same number of records per step."""
    found = []
    if options.batch_tokens is not None:
        tokens = options.batch_tokens
        while (tokens := tokens // 2) >= options.max_length_tokens:
            found.append(Change(f"--batch-tokens {tokens}", {f"{section}.batch_tokens": tokens}))
        return found
    for size in smaller_batch_sizes(options):
        keys: dict[str, Any] = {f"{section}.batch_size": size}
        flags = f"--batch-size {size}"
        if options.global_batch_size is None:
            keys[f"{section}.grad_accum_steps"] = records_per_step(options) // size
            flags += f" --grad-accum {keys[f'{section}.grad_accum_steps']}"
        found.append(Change(flags, keys))
    return found


def _methods(options: FftOptions) -> list[Change]:
    """Lower precision for the trained parameters, then different methods."""
    found = []
    if options.method != "lora":
        if not options.trains_adapter and not options.low_memory and options.optimizer == "adamw":
            found.append(Change("--low-memory", {"fft.low_memory": True}))
            found.append(Change("--optimizer adamw_8bit", {"fft.optimizer": "adamw_8bit"}))
        plain: dict[str, Any] = {"fft.method": "lora"}
        if options.low_memory:
            plain["fft.low_memory"] = False
        found.append(Change("--method lora" + (" --no-low-memory" if options.low_memory else ""), plain))
        found.append(Change(f"{found[-1].flags} --quantize nf4", {**plain, "fft.quantize": "nf4"}))
    elif options.quantize is None:
        found.append(Change("--quantize nf4", {"fft.quantize": "nf4"}))
    return found


def _fewer_layers(layers: Sequence[int]) -> list[Change]:
    """Successive halves of the layers, keeping the last ones: gradients stop at the first masked layer."""
    found, count = [], len(layers)
    while (count := count // 2) >= 1:
        text = format_layers(sorted(layers)[-count:])
        found.append(Change(f"--layers {text}", {"mask_train.layers": text}))
    return found


def _smaller_groups(recipe: Recipe) -> list[Change]:
    sizes = [size for size in recipe.probe.groups if size != "all"]
    smaller = sizes or [4]
    if list(recipe.probe.groups) == smaller:
        return []
    text = ",".join(map(str, smaller))
    return [Change(f"--groups {text}", {"probe.groups": smaller})]


def _evaluation_axis(recipe: Recipe) -> list[Change]:
    return [Change(), Change("--no-generate", {"eval.generate": False})] if recipe.eval.generate else [Change()]


def _single(recipe: Recipe) -> list[Change]:
    alone = recipe.eval.batch_size in (1, "auto")
    return [] if alone else [Change("--batch-size 1", {"eval.batch_size": 1})]
