from __future__ import annotations

from typing import Any

import pytest

from mftctl.errors import ConfigError
from mftctl.experiments.controls import RATE_FACTORS, jobs_with_controls
from mftctl.experiments.jobs import Job, spell_out
from mftctl.experiments.recipe_files import load_recipe, parse_recipe

FFT = {"command": "fft"}
MASK = {"command": "mask-train", "after": "fft"}


def jobs_of(stages: dict[str, Any], **keys: Any) -> list[Job]:
    return jobs_with_controls(parse_recipe({"model": "m", "stages": stages, **keys}))


def added(stages: dict[str, Any], **keys: Any) -> list[Job]:
    recipe = parse_recipe({"model": "m", "stages": stages, **keys})
    before = [job.name for job in spell_out(recipe)]
    jobs = jobs_with_controls(recipe)
    assert [job.name for job in jobs[: len(before)]] == before or len(recipe.seeds) > 1
    return jobs[len(before) :]


def evaluated(*masks: str) -> dict[str, Any]:
    return {"results": {"command": "eval", "of": ["fft", *masks]}}


def test_the_quickstart_trains_and_measures_its_controls() -> None:
    jobs = jobs_with_controls(load_recipe("quickstart"))
    trained = [job for job in jobs if " annealed" in job.name or " averaged" in job.name]
    assert [job.name.partition("[")[0] for job in trained] == ["fft annealed"] * 3 + ["fft averaged"] * 2
    measured = [job for job in jobs if job.candidates]
    assert [(job.name, job.label, job.command) for job in measured] == [
        ("results", "fft annealed", "eval"),
        ("results", "fft averaged", "eval"),
        ("results", "fft interpolated", "eval"),
    ]
    assert [len(job.candidates) for job in measured] == [3, 2, 1]
    assert all(job.recipe.eval.limit == 500 for job in measured)


def test_a_control_takes_the_steps_of_the_mask_from_the_same_model() -> None:
    keys = {
        "fft": {"learning_rate": 1e-3, "epochs": 7, "warmup_ratio": 0.5, "low_memory": True, "method": "gmt"},
        "mask_train": {"epochs": 2.5, "batch_size": 3, "grad_accum_steps": 2, "val_steps": 9, "max_length_tokens": 77},
    }
    controls = [job for job in added({"fft": FFT, "mft": MASK, **evaluated("mft")}, **keys) if job.command == "fft"]
    rates = [job.recipe.fft.learning_rate for job in controls]
    assert rates == pytest.approx([factor * 1e-3 for factors in RATE_FACTORS.values() for factor in factors])
    for job in controls:
        assert job.after is not None
        assert job.after.name == "fft"
        options = job.recipe.fft
        assert (options.epochs, options.batch_size, options.grad_accum_steps) == (2.5, 3, 2)
        assert (options.val_steps, options.max_length_tokens, options.warmup_ratio) == (9, 77, 0.03)
        assert (options.method, options.low_memory, options.keep) == ("full", True, "best")
    kinds = {(job.label.split("[")[0], job.recipe.fft.schedule, job.recipe.fft.average) for job in controls}
    assert kinds == {("fft annealed", "linear", "none"), ("fft averaged", "constant", "ema")}


def test_a_global_batch_is_that_of_the_mask() -> None:
    keys = {"mask_train": {"global_batch_size": 32, "batch_size": 4}, "fft": {"grad_accum_steps": 7}}
    controls = [job for job in added({"fft": FFT, "mft": MASK, **evaluated("mft")}, **keys) if job.command == "fft"]
    assert {(job.recipe.fft.global_batch_size, job.recipe.fft.grad_accum_steps) for job in controls} == {(32, None)}


def test_masks_with_the_same_steps_share_their_controls_and_others_do_not() -> None:
    longer = {**MASK, "set": {"mask_train.epochs": 5}}
    ratio = {**MASK, "set": {"mask_train.ratio": 0.2}}
    stages = {"fft": FFT, "a": MASK, "b": ratio, "c": longer, **evaluated("a", "b", "c")}
    labels = [job.label for job in added(stages, controls=["annealed"]) if job.command == "eval"]
    assert labels == ["fft annealed", "fft annealed of c"]


def test_controls_learn_from_the_records_that_the_mask_learns_from() -> None:
    stages = {"fft": FFT, "mft": MASK, **evaluated("mft")}

    def learned_from(stages: dict[str, Any], learn_from: str) -> set[str]:
        found = added(stages, controls=["averaged"], mask_train={"learn_from": learn_from}, data=["d.jsonl"])
        return {job.recipe.fft.learn_from for job in found if job.command == "fft"}

    assert [learned_from(stages, name) for name in ("auto", "unseen", "all")] == [{"all"}, {"unseen"}, {"all"}]
    half = {**stages, "fft": {**FFT, "set": {"fft.data_fraction": 0.5}}}
    assert learned_from(half, "auto") == {"auto"}
    other = {**stages, "mft": {**MASK, "set": {"data": ["more.jsonl"]}}}
    assert learned_from(other, "auto") == {"auto"}


def test_a_swept_mask_adds_each_control_and_its_evaluation_once() -> None:
    swept = {**MASK, "sweep": {"mask_train.ratio": [0.1, 0.2], "mask_train.epochs": [1, 2]}}
    found = added({"fft": FFT, "mft": swept, **evaluated("mft")})
    labels = [job.label for job in found if job.command == "eval"]
    assert len(labels) == len(set(labels)) == 5  # two controls for each number of epochs, and the interpolation
    assert [job.command for job in found].count("interpolate") == 1
    assert {job.name for job in found if job.command == "eval"} == {"results"}


def test_masks_of_different_data_have_their_own_controls() -> None:
    other = {**MASK, "set": {"data": ["other.jsonl"]}}
    stages = {"fft": FFT, "a": MASK, "b": other, **evaluated("a", "b")}
    controls = [job for job in added(stages, controls=["averaged"], data=["d.jsonl"]) if job.command == "fft"]
    assert [job.recipe.data[0].path for job in controls] == ["d.jsonl"] * 2 + ["other.jsonl"] * 2


def test_masks_applied_to_the_model_have_controls_too() -> None:
    stages = {"fft": FFT, "mft": MASK, "apply": {"command": "apply", "after": "mft"}, **evaluated("apply")}
    assert {job.label for job in added(stages) if job.command == "eval"} == {
        "fft annealed",
        "fft averaged",
        "fft interpolated",
    }


@pytest.mark.parametrize(
    "stages",
    [
        {"fft": FFT, "mft": MASK, **evaluated()},
        {"fft": FFT, "random": {**MASK, "set": {"mask_train.method": "random"}}, **evaluated("random")},
        {"fft": FFT, "drop": {**MASK, "set": {"mask_train.method": "drop"}}, **evaluated("drop")},
    ],
    ids=["a mask that is not measured", "random", "drop"],
)
def test_only_learned_masks_that_are_measured_have_controls(stages: dict[str, Any]) -> None:
    assert added(stages) == []


def test_controls_can_be_chosen_or_left_out() -> None:
    stages = {"fft": FFT, "mft": MASK, **evaluated("mft")}
    assert added(stages, controls=[]) == []
    assert [job.label for job in added(stages, controls=["interpolated"])] == ["fft interpolated"] * 2
    for wrong in (["ema"], ["annealed", "annealed"]):
        with pytest.raises(ConfigError) as caught:
            jobs_of(stages, controls=wrong)
        assert "controls" in str(caught.value)


def test_a_mask_of_the_given_model_has_no_interpolation() -> None:
    stages = {"mft": {"command": "mask-train"}, "results": {"command": "eval", "of": ["mft"]}}
    found = added(stages, fft={"learning_rate": 2e-4})
    assert {job.label.partition("[")[0] for job in found} == {"model annealed", "model averaged"}
    assert all(job.after is None for job in found if job.command == "fft")
    assert found[0].recipe.fft.learning_rate == pytest.approx(0.3 * 2e-4)


def test_each_seed_has_its_own_controls() -> None:
    stages = {"fft": FFT, "mft": MASK, **evaluated("mft")}
    jobs = jobs_of(stages, seeds=[0, 1], controls=["annealed"])
    assert [job.seed for job in jobs] == [0] * (len(jobs) // 2) + [1] * (len(jobs) // 2)
    for job in jobs:
        assert all(other.seed == job.seed for other in job.candidates)


def test_controls_of_a_mask_learned_from_preferences_are_trained_on_them() -> None:
    keys = {"mask_train": {"objective": "dpo", "beta": 0.3, "length_normalized": True}}
    jobs = added({"fft": FFT, "mft": MASK, **evaluated("mft")}, **keys)
    trained = [job.recipe.fft for job in jobs if job.command == "fft"]
    assert {(one.objective, one.beta, one.length_normalized) for one in trained} == {("dpo", 0.3, True)}
    # The fine-tuning itself is on answers, so that validation can choose a share of its change.
    assert [job.command for job in jobs].count("interpolate") == 1
    both = {"fft": {"objective": "dpo"}, **keys}
    assert not any(job.command == "interpolate" for job in added({"fft": FFT, "mft": MASK, **evaluated("mft")}, **both))
