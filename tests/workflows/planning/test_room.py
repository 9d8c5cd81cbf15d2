"""What fits in memory, and the search for the smallest change of options that makes a training fit."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe, parse_recipe
from mftctl.training.schedule import smaller_batch_sizes
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.planned_device import CONTEXT_BYTES, asked_device, parse_memory
from mftctl.workflows.planning.room import Smaller, Verdict, judge, smallest_options


def _smallest(command: str, recipe: Recipe, fits: Callable[[Recipe], bool], layers: int = 0) -> Smaller | None:
    return smallest_options(
        command, recipe, fits=fits, estimate=lambda _: MemoryEstimate(peak_bytes=7), layers=range(layers)
    )


def test_a_training_that_may_fit_is_never_reported_as_too_large() -> None:
    assert [judge(needed, 100) for needed in (95, 96, 117, 118)] == [
        Verdict.FITS,
        Verdict.CLOSELY,
        Verdict.CLOSELY,
        Verdict.NO,
    ]


def test_smaller_batches_come_first() -> None:
    found = _smallest("fft", Recipe(), lambda recipe: recipe.fft.batch_size <= 2)
    assert found == Smaller(
        "--batch-size 2 --grad-accum 4", "--set fft.batch_size=2 --set fft.grad_accum_steps=4", needed_bytes=7
    )


def test_then_checkpointing_then_precision_then_another_method() -> None:
    def flags(fits: Callable[[Recipe], bool]) -> str:
        found = _smallest("fft", parse_recipe({"fft": {"batch_size": 1}}), fits)
        return "" if found is None else found.flags

    assert flags(lambda recipe: recipe.fft.gradient_checkpointing) == "--gradient-checkpointing"
    assert flags(lambda recipe: recipe.fft.low_memory or recipe.fft.method == "lora") == "--low-memory"
    assert flags(lambda recipe: recipe.fft.method == "lora") == "--method lora"
    assert flags(lambda recipe: recipe.fft.quantize is not None) == "--method lora --quantize nf4"
    assert flags(lambda recipe: False) == ""


def test_fewer_mask_layers_come_last() -> None:
    found = _smallest(
        "mask-train",
        parse_recipe({"mask_train": {"batch_size": 1}}),
        lambda recipe: recipe.mask_train.low_memory and recipe.mask_train.layers == "6-7",
        layers=8,
    )
    assert found is None  # an option that saves more must fit as well
    found = _smallest(
        "mask-train",
        parse_recipe({"mask_train": {"batch_size": 1}}),
        lambda recipe: recipe.mask_train.low_memory and recipe.mask_train.layers in ("6-7", "7"),
        layers=8,
    )
    assert found is not None
    assert found.flags == "--low-memory --layers 6-7"


def test_a_probe_omits_the_group_of_all_layers() -> None:
    found = _smallest("probe", parse_recipe({}), lambda recipe: recipe.probe.groups == (4,))
    assert found is not None
    assert found.flags == "--groups 4"


def test_sizes_of_memory() -> None:
    assert [parse_memory(text) for text in ("80GB", "80 G", "1.5GiB", "512MB")] == [
        80 * 10**9,
        80 * 10**9,
        3 << 29,
        512 * 10**6,
    ]
    for text in ("80", "GB", "0GB", "1.2.3GB"):
        with pytest.raises(ConfigError, match="number with a unit"):
            parse_memory(text)


def test_a_given_memory_size_means_a_gpu_with_bf16() -> None:
    device = asked_device("auto", 80 * 10**9)
    assert (device.kind, device.has_bf16, device.free_bytes) == ("cuda", True, 80 * 10**9 - CONTEXT_BYTES)
    assert asked_device("cpu", 10).free_bytes == 10


@pytest.mark.parametrize(("batch_size", "accumulated", "sizes"), [(8, 1, [4, 2, 1]), (5, 1, [1]), (7, 3, [3, 1])])
def test_smaller_batches_keep_the_records_of_a_step(batch_size: int, accumulated: int, sizes: list[int]) -> None:
    recipe = parse_recipe({"fft": {"batch_size": batch_size, "grad_accum_steps": accumulated}})
    assert smaller_batch_sizes(recipe.fft) == sizes
    found = _smallest("fft", recipe, lambda recipe: recipe.fft.batch_size == 1)
    assert found is not None
    assert found.flags == f"--batch-size 1 --grad-accum {batch_size * accumulated}"


def test_suggested_settings_can_be_typed() -> None:
    recipe = parse_recipe({"probe": {"groups": [8, 4, "all"]}})
    groups = _smallest("probe", recipe, lambda recipe: recipe.probe.groups == (8, 4))
    layer = _smallest("mask-train", Recipe(), lambda recipe: recipe.mask_train.layers == "7", layers=8)
    assert groups is not None
    assert layer is not None
    for found in (groups, layer):
        words = shlex.split(found.sets)
        assert load_recipe(sets=words[1::2]) is not None
    assert "'probe.groups=[8,4]'" in groups.sets


@pytest.mark.parametrize("text", [f"{'9' * 400}GB", "0.0000001KB"])
def test_invalid_memory_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="number with a unit"):
        parse_memory(text)
