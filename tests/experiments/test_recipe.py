from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.experiments.deciding_keys import deciding_keys, in_names_of_today
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.presets import DEFAULT_PATIENCE, DEFAULT_RATIO
from mftctl.experiments.recipe import EvalOptions, Recipe, Stage
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.recipe_yaml import read_yaml
from mftctl.experiments.run_config import to_document

# Letters only: YAML reads an unquoted text such as 1e5 as a number.
TEXT = st.text("abcxyzäß -_/.:'\"#", min_size=1)
SOURCES = st.lists(
    st.builds(
        DataSource,
        st.from_regex(r"[a-z]{1,8}(\.jsonl|\.csv)?", fullmatch=True),
        st.none() | st.integers(1, 10**9),
        st.none() | st.just("test"),
    ),
    max_size=3,
).map(tuple)
POSITIVE = st.floats(1e-12, 1e6)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of single runs: without stages and seeds."""
    indicator = draw(st.sampled_from(["ratio", "threshold", None]))
    mask_train: dict[str, Any] = {} if indicator is None else {indicator: draw(st.floats(0, 0.99))}
    if indicator == "threshold" or draw(st.booleans()):
        mask_train |= {"preset": "paper", "learning_rate": draw(st.just("auto") | POSITIVE)}
    mask_train["layers"] = draw(st.none() | st.sampled_from(["all", "4-7", "0,3,8-11"]))
    return Recipe(
        name=draw(st.none() | TEXT),
        model=draw(st.none() | TEXT),
        data=draw(SOURCES),
        test_data=draw(SOURCES),
        seed=draw(st.integers(0, 2**40)),
        fft={"learning_rate": draw(POSITIVE), "max_steps": draw(st.none() | st.integers(1, 1000))},
        mask_train=mask_train,
        probe={"groups": draw(st.none() | st.lists(st.integers(1, 64) | st.just("all"), min_size=1, max_size=3))},
        eval={"task_data": draw(st.dictionaries(TEXT, TEXT, max_size=2)), "generate": draw(st.booleans())},
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(recipes())
def test_document_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert parse_recipe(to_document(recipe)) == recipe


@pytest.mark.slow
@settings(max_examples=40)
@given(recipes())
def test_written_configuration_reads_back_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(yaml.safe_dump(to_document(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert parse_recipe(read_yaml(path)) == recipe


def test_document_has_neither_stages_nor_seeds() -> None:
    recipe = Recipe(seeds=(1, 2), stages={"a": {"command": "fft"}}, model="m")
    document = to_document(recipe)
    assert not {"stages", "seeds"} & set(document)
    assert parse_recipe(document) == Recipe(model="m")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jsonl", (DataSource("a.jsonl"),)),
        ("a.jsonl=10", (DataSource("a.jsonl", 10),)),
        ({"path": "a", "count": 3, "split": "test"}, (DataSource("a", 3, "test"),)),
        (["a", {"path": "b"}], (DataSource("a"), DataSource("b"))),
        ([DataSource("a")], (DataSource("a"),)),
        ([], ()),
    ],
)
def test_data_is_a_text_a_mapping_or_a_list_of_either(value: object, expected: tuple[DataSource, ...]) -> None:
    assert Recipe.model_validate({"data": value}).data == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "The data source has no path"),
        ("=10", "The data source has no path"),
        ({"path": "a", "coutn": 3}, "coutn: Extra inputs are not permitted"),
        ({"path": 3}, "path: Input should be a valid string"),
        ({"path": ""}, "path: String should have at least 1 character"),
        ({"count": 3}, "path: Field required"),
        ({"path": "a", "count": 0}, "count: Input should be greater than 0"),
        ({"path": "a", "count": "3"}, "count: Input should be a valid integer"),
        (3, "instance of DataSource"),
        (None, "instance of DataSource"),
    ],
)
def test_data_of_another_form_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"data": value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        {"seed": "3"},
        {"seed": -1},
        {"seed": True},
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"fft": {"epochs": 0}},
        {"fft": {"epochs": math.inf}},
        {"fft": {"max_steps": 1.0}},
        {"fft": {"learning_rate": "auto"}},
        {"fft": {"gradient_checkpointing": 1}},
        {"fft": {"keep": "newest"}},
        {"fft": {"warmup_ratio": 1.0}},
        {"mask_train": {"ratio": 1.0}},
        {"mask_train": {"ratio": -0.1}},
        {"mask_train": {"ratio": math.nan}},
        {"mask_train": {"threshold": math.nan}},
        {"mask_train": {"target": "embeddings"}},
        {"mask_train": {"learning_rate": "fast"}},
        {"probe": {"groups": []}},
        {"probe": {"groups": ["4"]}},
        {"probe": {"groups": ["some"]}},
        {"probe": {"data_fraction": 1.5}},
        {"eval": {"tasks": "gsm8k"}},
        {"stages": {"a": {"command": "report"}}},
        {"stages": {"a": {}}},
        {"colour": "red"},
    ],
    ids=str,
)
def test_value_that_does_not_fit_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(document)


def test_whole_number_is_accepted_for_a_fractional_one() -> None:
    assert Recipe.model_validate({"fft": {"epochs": 3}}).fft.epochs == 3.0
    assert Recipe.model_validate({"probe": {"data_fraction": 1}}).probe.data_fraction == 1.0


def test_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 3  # type: ignore[misc]


def test_ratio_in_force() -> None:
    assert MaskTrainOptions().ratio is None
    assert MaskTrainOptions(preset="paper").ratio == DEFAULT_RATIO
    assert MaskTrainOptions(method="random").ratio == DEFAULT_RATIO
    assert MaskTrainOptions(ratio=0.0).ratio == 0.0
    assert MaskTrainOptions(preset="paper", threshold=-0.03).ratio is None


@pytest.mark.parametrize(
    ("document", "start", "ranking", "threshold", "ratio", "patience"),
    [
        ({}, "weights", "signed", 0.0, None, DEFAULT_PATIENCE),
        ({"ratio": 0.2}, "weights", "signed", None, 0.2, DEFAULT_PATIENCE),
        ({"threshold": -0.5, "patience": 2}, "weights", "signed", -0.5, None, 2),
        (
            {"start": "kaiming", "ranking": "absolute", "ratio": 0.1},
            "kaiming",
            "absolute",
            None,
            0.1,
            DEFAULT_PATIENCE,
        ),
        ({"keep": "last"}, "weights", "signed", 0.0, None, None),
        ({"preset": "paper"}, "normal", "absolute", None, DEFAULT_RATIO, None),
        ({"preset": "reference"}, "normal", "absolute", None, DEFAULT_RATIO, None),
        ({"preset": "paper", "threshold": 0.0, "start": "constant"}, "constant", "absolute", 0.0, None, None),
    ],
    ids=str,
)
def test_a_preset_is_the_settings_not_given(
    document: dict[str, Any], start: str, ranking: str, threshold: float | None, ratio: float | None, patience: int
) -> None:
    options = MaskTrainOptions.model_validate(document)
    assert (options.start, options.ranking) == (start, ranking)
    assert (options.threshold, options.ratio) == (threshold, ratio)
    assert options.patience == patience


@pytest.mark.parametrize(
    ("preset", "keep", "averages_records"),
    [("default", "best", False), ("paper", "best", False), ("reference", "last", True)],
)
def test_the_reference_keeps_the_last_mask_and_averages_records(preset: str, keep: str, averages_records: bool) -> None:
    options = MaskTrainOptions.model_validate({"preset": preset})
    assert (options.keep, options.averages_records) == (keep, averages_records)
    assert MaskTrainOptions.model_validate({"preset": preset, "keep": "best"}).keep == "best"
    assert MaskTrainOptions.model_validate({"preset": preset, "method": "random"}).keep == "best"


def test_prompts_of_olmes_without_a_benchmark_are_refused() -> None:
    with pytest.raises(ValidationError, match="olmes applies only to benchmarks"):
        EvalOptions(prompts="olmes")
    assert EvalOptions(prompts="olmes", tasks=("gsm8k",)).prompts == "olmes"


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"travel": 3.2}, "travel applies only to start normal, kaiming, constant, identity; the start is weights"),
        ({"start_std": 0.1}, "start_std applies only to start normal; the start is weights"),
        ({"start_value": 0.1}, "start_value applies only to start constant; the start is weights"),
        ({"start_value": 0.1, "preset": "paper"}, "start_value applies only to start constant; the start is normal"),
    ],
)
def test_a_key_of_a_different_start_is_refused(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=f"mask_train.{problem}"):
        MaskTrainOptions.model_validate(document)


def test_ratio_and_threshold_together_are_refused() -> None:
    with pytest.raises(ValidationError, match="either a ratio, a threshold or a pattern"):
        MaskTrainOptions(ratio=0.1, threshold=-0.03)


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_threshold_without_learned_scores_is_refused(method: str) -> None:
    with pytest.raises(ValidationError, match=f"the method {method} takes a ratio"):
        MaskTrainOptions.model_validate({"method": method, "threshold": 0.0})


@pytest.mark.parametrize("section", [FftOptions, MaskTrainOptions])
def test_two_sizes_of_a_step_are_refused(section: type[FftOptions | MaskTrainOptions]) -> None:
    with pytest.raises(ValidationError, match="either global_batch_size or grad_accum_steps"):
        section.model_validate({"global_batch_size": 8, "grad_accum_steps": 1})


def test_a_global_batch_that_is_not_a_multiple_is_refused() -> None:
    with pytest.raises(ValidationError, match="12 is not a multiple of 8"):
        FftOptions(batch_size=8, global_batch_size=12)
    assert FftOptions(batch_size=8, global_batch_size=12, batch_tokens=100).global_batch_size == 12


@pytest.mark.parametrize("section", ["fft", "mask_train"])
def test_deciding_keys_of_a_step_do_not_depend_on_its_notation(section: str) -> None:
    command = section.replace("_", "-")

    def keys(**options: int) -> dict[str, Any]:
        return deciding_keys(Recipe.model_validate({section: {"batch_size": 4, **options}}), command)

    assert keys(global_batch_size=8) == keys(grad_accum_steps=2) == keys(grad_accum_steps=2, batch_tokens=99)
    assert keys() == keys(grad_accum_steps=1) != keys(global_batch_size=8)
    assert keys(global_batch_size=10, batch_tokens=99) != keys(global_batch_size=11, batch_tokens=99)
    assert "global_batch_size" not in keys(grad_accum_steps=2)[section]  # as in records of older versions


@pytest.mark.parametrize("command", ["mask-train", "probe"])
def test_deciding_keys_name_a_kind_only_where_it_is_new(command: str) -> None:
    """Earlier versions made weight masks, and delta masks with the method drop only."""

    def keys(**options: str) -> dict[str, Any]:
        found = deciding_keys(Recipe.model_validate({"mask_train": options}), command)
        assert in_names_of_today(found) == found
        return found

    assert "kind" not in keys()["mask_train"]
    assert keys() == keys(kind="weight") != keys(kind="delta")
    assert keys(kind="delta")["mask_train"]["kind"] == "delta"
    assert keys(method="drop") == keys(method="drop", kind="delta")
    assert "kind" not in keys(method="drop")["mask_train"]


def test_deciding_keys_name_a_rescaled_drop_only() -> None:
    def keys(**options: Any) -> dict[str, Any]:
        recipe = Recipe.model_validate({"mask_train": {"method": "drop", "strategy": "random", **options}})
        return dict(deciding_keys(recipe, "mask-train")["mask_train"])

    assert "rescale" not in keys(rescale=False)
    assert keys(rescale=True) == {**keys(), "rescale": True}


OF_RECORDS = {"chat_template", "template_args", "merge_system", "learn", "bad_records"}
SECTION_CHANGES: dict[str, dict[str, Any]] = {
    "fft": {"fft": {"epochs": 9.0}},
    "probe": {"probe": {"data_fraction": 0.9}},
    "mask_train": {"mask_train": {"ratio": 0.9}},
    "eval": {"eval": {"limit": 9}},
    "seed": {"seed": 9},
    "test_data": {"test_data": "t.jsonl"},
    "chat_template": {"chat_template": "tulu"},
    "template_args": {"template_args": {"enable_thinking": False}},
    "merge_system": {"merge_system": True},
    "learn": {"learn": "last"},
    "bad_records": {"bad_records": "skip"},
    "name": {"name": "another"},
    "stages": {"stages": {"a": {"command": "fft"}}},
}


@pytest.mark.parametrize(
    ("command", "decides"),
    [
        ("fft", {"fft"}),
        ("probe", {"probe", "mask_train"}),
        ("mask-train", {"mask_train"}),
        ("apply", set()),
        ("eval", {"eval"}),
    ],
)
def test_deciding_keys_change_only_with_settings_the_command_reads(command: str, decides: set[str]) -> None:
    plain = deciding_keys(Recipe(), command)
    changed = {
        key for key, change in SECTION_CHANGES.items() if deciding_keys(Recipe.model_validate(change), command) != plain
    }
    assert changed == decides | {"seed", "test_data", *OF_RECORDS}
    assert not OF_RECORDS & plain.keys()  # so that runs of older versions are recognised


ALL_USES = ("eval", "fft", "mask-train", "interpolate", "delta")


@pytest.mark.parametrize(
    ("change", "commands"),
    [
        ({"test_data": ["t.jsonl=9"]}, {"eval"}),
        ({"retain_data": ["t.jsonl=9"]}, {"eval", "fft", "mask-train", "interpolate"}),
        ({"retain_data": ["t.jsonl=9"], "delta": {"select": "learned", "ratio": 0.5}}, set(ALL_USES)),
        ({"test_data": ["t.jsonl=9"], "fft": {"benchmark_every": 5}}, {"eval", "fft"}),
        ({"test_data": ["t.jsonl"], "retain_data": ["t.jsonl"], "data": ["t.jsonl=9"]}, set()),
    ],
)
def test_results_of_versions_that_sampled_evaluation_data_by_the_seed_are_not_reused(
    change: dict[str, Any], commands: set[str]
) -> None:
    for command in ("probe", "apply", *ALL_USES):
        is_marked = [
            "evaluation_samples" in deciding_keys(parse_recipe({"seed": n, **change}), command) for n in (0, 1)
        ]
        assert is_marked == [False, command in commands]


def test_every_key_is_explained() -> None:
    annotations = [field.annotation for field in Recipe.model_fields.values()]
    sections = [item for item in annotations if isinstance(item, type) and issubclass(item, BaseModel)]
    assert len(sections) == 6
    unexplained = [
        f"{section.__name__}.{key}"
        for section in (*sections, Stage)
        for key, field in section.model_fields.items()
        if not field.description
    ]
    assert unexplained == []


def test_configuration_of_a_run_is_plain_data() -> None:
    document = to_document(Recipe(data=("a.jsonl=3",), model="m"))  # type: ignore[arg-type]
    assert document["data"] == [{"path": "a.jsonl", "count": 3}]
    assert yaml.safe_load(yaml.safe_dump(document)) == document


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0%", 0.0), ("0", 0.0), ("0.5", 0.5), ("100%", 1.0)])
def test_share_of_bad_records_as_text(text: str, share: float) -> None:
    assert Recipe.model_validate({"bad_records_max": text}).bad_records_max == share


@pytest.mark.parametrize("text", ["", "%", "5", "101%", "-1", "nan", "nan%", "inf", "few"])
def test_text_that_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="a share is a percentage such as 1%, or a number from 0 to 1"):
        Recipe.model_validate({"bad_records_max": text})


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://example.org", "http://[::1]:1/a/v1"])
def test_url_of_a_server_loses_only_a_slash_at_its_end(url: str) -> None:
    for text in (url, f"{url}/"):
        assert parse_recipe({"eval": {"base_url": text}}).eval.base_url == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        *(
            (text, "starts with http://")
            for text in ("", "localhost:8000", "ftp://a", "http://", "http://a:x", "http://[")
        ),
        *((f"http://{text}", "OPENAI_API_KEY") for text in ("me@a/v1", "me:secret@a", "a/v1?key=secret", "a#secret")),
        *((f"http://a/v1/{text}", "/completions is added") for text in ("completions", "chat/completions/", "models")),
    ],
)
def test_text_that_is_no_url_of_a_server_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"eval": {"base_url": url}})
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


def test_deciding_keys_name_a_server_only_where_one_is_asked() -> None:
    local = deciding_keys(parse_recipe({}), "eval")["eval"]
    assert not {"base_url", "served_model", "concurrent_requests"} & set(local)
    options = {"engine": "openai", "base_url": "http://a", "concurrent_requests": 3}
    assert deciding_keys(parse_recipe({"eval": options}), "eval")["eval"] == {
        **local,
        "engine": "openai",
        "base_url": "http://a",
    }
