"""From stages to jobs: order, sweeps, seeds, and incompatible stages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import ConfigError
from mftctl.experiments.jobs import Job, spell_out, stage_order
from mftctl.experiments.recipe import Recipe, Stage
from mftctl.experiments.recipe_files import parse_recipe


def tasks_of(stages: dict[str, Any], **keys: Any) -> list[Job]:
    return spell_out(parse_recipe({"model": "m", "stages": stages, **keys}))


def test_a_stage_comes_after_what_it_needs_otherwise_in_the_order_written() -> None:
    order = stage_order(
        {
            "results": Stage(command="eval", of=("mft", "fft")),
            "mft": Stage(command="mask-train", after="fft", layers_from="probe"),
            "probe": Stage(command="probe", after="fft"),
            "pretrained": Stage(command="eval"),
            "fft": Stage(command="fft"),
        }
    )
    assert order == ["pretrained", "fft", "probe", "mft", "results"]


@pytest.mark.slow
@given(st.data())
def test_any_order_of_writing_respects_the_needs(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    needs = {
        f"s{number}": data.draw(st.sets(st.integers(0, number - 1))) if number else set() for number in range(count)
    }
    names = data.draw(st.permutations(list(needs)))
    stages = {name: Stage(command="eval", of=tuple(f"s{other}" for other in needs[name])) for name in names}
    order = stage_order(stages)
    assert sorted(order) == sorted(names)
    assert all(order.index(f"s{other}") < order.index(name) for name in names for other in needs[name])


def test_an_unknown_stage_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="not in the recipe") as caught:
        stage_order({"fft": Stage(command="fft"), "mft": Stage(command="mask-train", after="fftt")})
    assert caught.value.key == "stages.mft"
    assert caught.value.actual == "fftt"
    assert caught.value.hint == "did you mean fft?"


def test_a_circle_of_stages_is_named() -> None:
    with pytest.raises(ConfigError, match="in a cycle") as caught:
        stage_order(
            {
                "a": Stage(command="fft", after="c"),
                "b": Stage(command="fft", after="a"),
                "c": Stage(command="fft", after="b"),
            }
        )
    assert sorted(set(str(caught.value.actual).split(" -> "))) == ["a", "b", "c"]


def test_a_stage_that_needs_itself_is_a_circle() -> None:
    with pytest.raises(ConfigError, match="in a cycle"):
        stage_order({"a": Stage(command="fft", after="a")})


def test_a_sweep_gives_one_task_per_combination_with_its_dependents() -> None:
    tasks = tasks_of(
        {
            "fft": {"command": "fft"},
            "mft": {
                "command": "mask-train",
                "after": "fft",
                "sweep": {"mask_train.ratio": [0.02, 0.4], "mask_train.layers": ["0-3", "all"]},
            },
            "apply": {"command": "apply", "after": "mft"},
            "results": {"command": "eval", "of": ["fft", "apply"]},
        }
    )
    names = [task.name for task in tasks]
    variants = [f"[ratio={ratio},layers={layers}]" for ratio in (0.02, 0.4) for layers in ("0-3", "all")]
    assert names == [
        "fft",
        *(f"mft{text}" for text in variants),
        *(f"apply{text}" for text in variants),
        "results",
        *(f"results{text}" for text in variants),
    ]
    assert [task.label for task in tasks[-5:]] == ["fft", *(f"apply{text}" for text in variants)]
    swept = tasks[2]
    assert (swept.recipe.mask_train.ratio, swept.recipe.mask_train.layers) == (0.02, "all")
    assert tasks[6].after is swept


def test_a_probe_of_another_variant_is_not_paired() -> None:
    tasks = tasks_of(
        {
            "fft": {"command": "fft", "sweep": {"fft.learning_rate": [1e-3, 1e-4]}},
            "probe": {"command": "probe", "after": "fft"},
            "mft": {"command": "mask-train", "after": "fft", "layers_from": "probe"},
        }
    )
    pairs = [(task.after.name, task.layers_from.name) for task in tasks if task.after and task.layers_from]
    assert pairs == [
        ("fft[learning_rate=0.001]", "probe[learning_rate=0.001]"),
        ("fft[learning_rate=0.0001]", "probe[learning_rate=0.0001]"),
    ]


def test_every_seed_has_all_tasks_of_its_own() -> None:
    stages = {"fft": {"command": "fft"}, "again": {"command": "fft", "after": "fft"}}
    tasks = tasks_of(stages, seeds=[3, 5])
    assert [(task.name, task.seed, task.recipe.seed) for task in tasks] == [
        ("fft", 3, 3),
        ("again", 3, 3),
        ("fft", 5, 5),
        ("again", 5, 5),
    ]
    assert tasks[3].after is tasks[2]


def test_what_a_stage_sets_and_sweeps_is_in_its_recipe() -> None:
    (task,) = tasks_of({"x": {"command": "fft", "set": {"fft.keep": "last"}, "sweep": {"fft.max_steps": [7]}}})
    assert (task.recipe.fft.keep, task.recipe.fft.max_steps, task.recipe.stages) == ("last", 7, {})


def test_swept_values_are_checked_when_the_recipe_is_read() -> None:
    with pytest.raises(ConfigError) as caught:
        tasks_of({"mft": {"command": "mask-train", "sweep": {"mask_train.ratio": [0.1, 1.5]}}})
    assert any("mask_train.ratio" in problem and "1.5" in problem for problem in caught.value.problems)


def test_swept_values_that_stages_inherit_are_counted_and_not_spelled_out() -> None:
    swept, fewer = list(range(1, 401)), list(range(300))
    after: dict[str, Any] = {
        "a": {"command": "fft", "sweep": {"seed": fewer}},
        "b": {"command": "fft", "after": "a", "sweep": {"fft.batch_size": swept}},
    }
    probed: dict[str, Any] = {
        "a": {"command": "fft", "sweep": {"fft.batch_size": swept}},
        "b": {"command": "probe", "sweep": {"seed": fewer}},
        "c": {"command": "mask-train", "after": "a", "layers_from": "b"},
    }
    for stages in (after, probed):
        recipe = Recipe.model_validate({"stages": stages})
        with pytest.raises(ConfigError, match="has too many stages"):
            spell_out(recipe)
