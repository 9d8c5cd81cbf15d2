"""Whether an estimate fits what is there, and with which options it would."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.training_options import FftOptions, TrainingOptions
from mftctl.masking.targets import format_layers
from mftctl.training.schedule import records_per_step, smaller_batch_sizes
from mftctl.workflows.planning.memory import MemoryEstimate

SPARE_SHARE = 0.05
"""Of what is there: left free by what fits, since allocators lose some."""

STOPPING_SHARE = 0.85
"""Of an estimate: if not even so much fits, a command is stopped. Estimates are nearer to what was counted."""


class Verdict(StrEnum):
    """Whether something fits."""

    FITS = "fits"
    CLOSELY = "closely"
    NO = "no"


def judge(needed_bytes: int, free_bytes: int) -> Verdict:
    """Whether an estimate fits what is free; what may fit is never called too large.

    Args:
        needed_bytes: By the estimate.
        free_bytes: What is there.
    """
    if needed_bytes <= (1 - SPARE_SHARE) * free_bytes:
        return Verdict.FITS
    return Verdict.CLOSELY if STOPPING_SHARE * needed_bytes <= free_bytes else Verdict.NO


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a recipe that saves memory.

    Attributes:
        flags: As options of the command.
        keys: The same as dotted keys of the recipe.
    """

    flags: str = ""
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> str:
        """The same as `--set`, for `run`."""
        return " ".join(f"--set {shlex.quote(f'{key}={_value(value)}')}" for key, value in self.keys.items())


def _value(value: Any) -> str:
    """As YAML reads it."""
    return json.dumps(value, separators=(",", ":")).strip('"')


@dataclass(frozen=True, slots=True)
class Smaller:
    """The smallest set of options with which something fits.

    Attributes:
        flags: As options of the command.
        sets: As `--set`, for `run`.
        needed_bytes: By the estimate.
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
    """The set of options, searched from the cheapest to the dearest, with which a command fits; None if there is none.

    Cheapest are smaller batches, which change nothing but time, then activations computed twice, numbers of lower
    precision, and last of all another method or fewer layers.

    Args:
        command: Which one.
        recipe: As it is.
        fits: Whether a recipe does; what saves less may be asked after what saves more.
        estimate: Of a recipe that does.
        layers: Those that carry the mask, where the command has a say in it.
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
    """The first choice of each axis, dearest axes first, with which the recipe fits."""
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
    """The recipe with changes; None where they do not go together."""
    keys = {key: value for change in changes for key, value in change.keys.items()}
    try:
        return with_changes(recipe, keys)
    except ConfigError:
        return None


def _axes(command: str, recipe: Recipe, layers: Sequence[int]) -> list[list[Change]]:
    """What can be changed, the dearest first; each from as it is to what saves most."""
    as_it_is = Change()
    if command == "fft":
        return [[as_it_is, *_methods(recipe.fft)], *_training_axes("fft", recipe.fft)]
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
    if command == "probe":  # which has no options of its own for these
        training = [[Change(change.sets, change.keys) for change in axis] for axis in training]
    return [fewer, low, *training]


def _training_axes(section: str, options: TrainingOptions) -> list[list[Change]]:
    """Activations computed twice, and smaller batches."""
    checkpointing = [Change()]
    if not options.gradient_checkpointing:
        checkpointing.append(Change("--gradient-checkpointing", {f"{section}.gradient_checkpointing": True}))
    return [checkpointing, [Change(), *_smaller_batches(section, options)]]


def _smaller_batches(section: str, options: TrainingOptions) -> list[Change]:
    """Halves of the batch, with as many records a step as before."""
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
    """Other precisions of what is trained, then other methods."""
    found = []
    if options.method != "lora":
        if not options.low_memory and options.optimizer == "adamw":
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
    """Halves of the layers, the last of them: gradients need not go further than to the first one masked."""
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
