"""The part of a recipe that determines a command's result, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mftctl.data.sources import EVALUATION_SEED
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.presets import SETTLED
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.renamed import with_new_names
from mftctl.experiments.run_config import settled_sections

OF_THE_MACHINE = ("device", "attention", "trust_remote_code", "track")
"""Keys for device, kernels, trust and trackers, which later commands need not share."""

_WITHOUT_EFFECT = {
    "fft": {"batch_tokens", "average_device"},
    "mask_train": {"batch_tokens", "average_device", "prefix_cache_gb"},
    "eval": {"tensor_parallel", "gpu_memory_share", "max_model_length_tokens", "concurrent_requests"},
}
"""Keys that affect where and how fast something is computed, but not its result."""

_SHARED = ("model", "revision", "data", "val_data", "val_fraction", "test_data", "seed")
IN_THE_MODEL = ("chat_template", "template_args", "merge_system")
"""Keys that fine-tuning saves in the tokenizer of its model, so that later commands do not need them."""

_OF_RECORDS = (*IN_THE_MODEL, "learn", "bad_records", "retain_data")
"""Keys added later: omitted at their defaults, so that earlier runs are still recognised."""

_OF_TRAINING = (
    "average",
    "best_by",
    "average_horizons",
    "decay_ratio",
    "retain_weight",
    "objective",
    "beta",
    "length_normalized",
)
_OF_SECTIONS = {
    "fft": ("exclude", "learn_from", "lora_experts", "support", *_OF_TRAINING),
    "mask_train": (
        *("budget", "harden", "keep", "kind", "mask", "max_multiplier", "pattern", "projections", "rescale"),
        *("start_std", "unit", *_OF_TRAINING),
    ),
    "probe": ("by", "unit"),
    "eval": ("prompts", "base_url", "served_model"),
}
"""The same within sections."""

_NOT_OF_A_SCORE = {
    *("tasks", "task_data", "predictions", "engine", "base_url", "served_model"),
    *("save_samples", "max_length_tokens", "generate"),
}
"""Keys of `eval` that do not affect the score a probe ranks by; one of the local files does."""

_RATE = {"fft": {"method", "learning_rate"}}
_SECTIONS: dict[str, dict[str, Any]] = {
    "fft": {"fft": True},
    "probe": {"probe": True, "mask_train": True, **_RATE},
    "mask-train": {"mask_train": True, **_RATE},
    "delta": {"delta": True},
    "interpolate": {"interpolate": True, "fft": {"max_length_tokens"}},
    "eval": {"eval": True},
}


def deciding_keys(recipe: Recipe, command: str) -> dict[str, Any]:
    """Returns the part of a recipe that determines a command's result, as plain data."""
    sections = dict(_SECTIONS.get(command, {}))
    if command == "delta" and recipe.delta.needs_data:
        sections |= {"mask_train": True, **_RATE}
    training = {"fft": recipe.fft, "mask-train": recipe.mask_train}.get(command)
    if training is not None and (training.benchmark_every is not None or training.best_by != "loss"):
        sections["eval"] = True  # the result then depends on what was measured during training
    changed = [key for key in _OF_RECORDS if getattr(recipe, key) != getattr(Recipe(), key)]
    included: dict[str, Any] = {**dict.fromkeys((*_SHARED, *changed), True), **sections}
    keys = recipe.model_dump(mode="json", include=included, exclude=_WITHOUT_EFFECT)
    if recipe.seed != EVALUATION_SEED and _samples_evaluation_data(recipe, command):
        keys["evaluation_samples"] = "the same for every seed"  # in earlier versions, those of the recipe's seed
    if command == "probe" and recipe.probe.by != "loss":
        keys["eval"] = _of_score(recipe)
    for section, later in _OF_SECTIONS.items():
        for key in later:
            if section in keys and _is_default(section, key, dict(getattr(recipe, section))):
                keys[section].pop(key, None)
    for section in ("fft", "mask_train"):
        if "grad_accum_steps" in keys.get(section, {}):
            _spell_step(keys[section])
    return keys


def measuring_training(recipe: Recipe, command: str) -> FftOptions | MaskTrainOptions | None:
    """The options of a command's training, if that may measure the data to retain and benchmarks; else None."""
    if command == "fft":
        return recipe.fft
    validates = command == "mask-train" and recipe.mask_train.method != "drop"
    return recipe.mask_train if validates or (command == "delta" and recipe.delta.select == "learned") else None


def _samples_evaluation_data(recipe: Recipe, command: str) -> bool:
    """True if a command uses a sample of the recipe's test data or data to retain."""
    training = measuring_training(recipe, command)
    during_training = training is not None and training.benchmark_every is not None
    used = (
        *(recipe.retain_data if training is not None or command in ("eval", "interpolate") else ()),
        *(recipe.test_data if during_training or command == "eval" else ()),
    )
    return any(source.count is not None for source in used)


def in_names_of_today(decides: Mapping[str, Any]) -> dict[str, Any]:
    """Converts recorded keys of any version to the form that `deciding_keys` returns.

    Earlier versions recorded only the values that were given and left derived ones empty.

    Args:
        decides: The recorded keys; values that are not valid in this version are kept.
    """
    renamed = with_new_names(decides)
    settled = settled_sections(renamed)
    for name, keys in SETTLED.items():
        section = renamed.get(name)
        if settled is None or not isinstance(section, dict):
            continue
        later = _OF_SECTIONS.get(name, ())
        values = {key: settled[name][key] for key in keys if key in section or key in later}
        same = {key for key in later if key in keys and _is_default(name, key, settled[name])}
        renamed[name] = {key: value for key, value in {**section, **values}.items() if key not in same}
    return renamed


def _is_default(section: str, key: str, options: Mapping[str, Any]) -> bool:
    """True if a key added later has the value that it implicitly had before."""
    if (section, key) == ("mask_train", "kind") and options["method"] == "drop":
        return True  # has always made delta masks
    return bool(options[key] == getattr(getattr(Recipe(), section), key))


def _of_score(recipe: Recipe) -> dict[str, Any]:
    """Returns the keys of section `eval` that determine the score a probe ranks by."""
    by = recipe.probe.by
    keys = recipe.eval.model_dump(mode="json", exclude=_NOT_OF_A_SCORE | _WITHOUT_EFFECT["eval"])
    file = recipe.eval.task_data.get(by)
    return {**keys, "task_data": {} if file is None else {by: file}}


def _spell_step(section: dict[str, Any]) -> None:
    """Normalises the size of a step, as accumulation in one process where possible."""
    stated = section.pop("global_batch_size")
    if stated is None:
        section["grad_accum_steps"] = section["grad_accum_steps"] or 1
    elif stated % section["batch_size"]:
        section["global_batch_size"] = stated
    else:
        section["grad_accum_steps"] = stated // section["batch_size"]
