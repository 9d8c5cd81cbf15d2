from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.experiments import recipe_files
from mftctl.experiments.recipe_files import (
    assign,
    built_in_names,
    find_recipe,
    load_recipe,
    parse_recipe,
    with_changes,
)
from mftctl.experiments.recipe_yaml import read_yaml


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two built-in recipes."""
    folder = tmp_path / "built-in"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text("model: quickstart\n")
    (folder / "long-run.yaml").write_text("model: big\n")
    monkeypatch.setattr(recipe_files, "BUILT_IN_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(document: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(document)
    return caught.value.problems


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "fft.average_horizons: at least 1 value expected, got []"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], "fft.average_horizons: at most 4 values expected, got [0.1, 0.2, 0.3, 0.4, 0.5]"),
        (0.3, "fft.average_horizons: a list such as [a, b] expected, got 0.3"),
    ],
)
def test_lists_are_described_without_python_words(value: object, problem: str) -> None:
    assert problems_of({"fft": {"average_horizons": value}}) == (problem,)


# Finding


def test_built_in_recipe_is_found_by_name(built_in: Path) -> None:
    assert built_in_names() == ["long-run", "quickstart"]
    assert find_recipe("quickstart") == built_in / "quickstart.yaml"
    assert load_recipe("long-run").model == "big"


def test_recipe_is_found_by_path(built_in: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "model: mine\n")
    assert load_recipe(path).model == "mine"
    assert load_recipe("recipe.yaml").model == "mine"
    assert load_recipe(str(built_in / "quickstart.yaml")).model == "quickstart"


def test_file_comes_before_a_built_in_recipe_of_its_name(built_in: Path, tmp_path: Path) -> None:
    (tmp_path / "quickstart").write_text("model: mine\n")
    assert find_recipe("quickstart") == Path("quickstart")


@pytest.mark.usefixtures("built_in")
@pytest.mark.parametrize("name", ["quickstat", "quickstart.yaml", "../built-in/quickstart", "built-in", "", "*"])
def test_unknown_recipe_is_a_config_error_that_names_the_built_in_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="The recipe does not exist") as caught:
        find_recipe(name)
    assert "built-in recipes: long-run, quickstart" in str(caught.value.expected)
    if name in ("quickstat", "quickstart.yaml"):
        assert caught.value.hint == "did you mean quickstart?"


# Reading


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E5", 2e5), ("1.e3", 1e3), (".5e-1", 0.05), ("+1.5e+3", 1500.0), ("1.0e-5", 1e-5)],
)
def test_number_in_exponent_notation_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    assert load_recipe(write(tmp_path, f"fft: {{learning_rate: {text}}}")).fft.learning_rate == value
    assert load_recipe(sets=[f"fft.learning_rate={text}"]).fft.learning_rate == value


@given(st.floats(1e-30, 1e30))
def test_any_number_in_python_notation_is_read_as_that_number(value: float) -> None:
    assert load_recipe(sets=[f"fft.learning_rate={value!r}"]).fft.learning_rate == value


def test_text_with_an_e_stays_text(tmp_path: Path) -> None:
    assert read_yaml(Path(write(tmp_path, "a: e4\nb: 1e\nc: '1e5'\nd: 1e5x\n"))) == {
        "a": "e4",
        "b": "1e",
        "c": "1e5",
        "d": "1e5x",
    }


@pytest.mark.parametrize(
    ("text", "line"), [("seed: 1\nmodel: m\nseed: 2\n", 3), ("fft:\n  epochs: 1\n  max_steps: 2\n  epochs: 1\n", 4)]
)
def test_key_that_stands_twice_is_a_config_error_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(Path(path))
    assert caught.value.path == f"{path}:{line}"
    assert "duplicate key" in str(caught.value.actual)


def test_merged_keys_are_not_duplicates(tmp_path: Path) -> None:
    text = "fft: &train {epochs: 2, batch_size: 4}\nmask_train: {<<: *train, epochs: 3}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.fft.epochs, recipe.mask_train.epochs, recipe.mask_train.batch_size) == (2, 3, 4)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"fft: {epochs: 1\n", ":2"),
        (b"a: b: c\n", ":1"),
        (b"model: *missing\n", ":1"),
        (b"model: !!python/object:os.system x\n", ":1"),
        (b"? [a]\n: b\n", ":1"),
        (b"name: a\x01b\n", ""),
        (b"name: 2024-13-45\n", ""),
    ],
    ids=["unclosed", "nested", "unknown alias", "python object", "list as key", "control character", "no date"],
)
def test_file_that_is_not_yaml_is_a_config_error(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        read_yaml(path)
    assert caught.value.path == f"{path}{place}"


@pytest.mark.parametrize("text", ["", "- fft\n", "fft\n", "3\n"])
def test_file_without_a_mapping_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="mapping of keys"):
        read_yaml(Path(write(tmp_path, text)))


def test_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "recipe.yaml")


# Precedence


def test_option_wins_over_set_over_recipe_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "fft: {epochs: 2, batch_size: 2, max_length_tokens: 2}\n")
    recipe = load_recipe(
        path, sets=["fft.epochs=3", "fft.batch_size=3"], options={"fft.epochs": 4, "fft.grad_accum_steps": 4}
    )
    fft = recipe.fft
    assert (fft.epochs, fft.batch_size, fft.max_length_tokens, fft.grad_accum_steps) == (4, 3, 2, 4)
    assert fft.max_grad_norm == 1.0


def test_base_is_used_without_a_recipe(tmp_path: Path) -> None:
    base = {"model": "base", "seed": 5, "fft": {"epochs": 2.0}}
    recipe = load_recipe(base=base, sets=["fft.batch_size=3"], options={"seed": 6})
    assert (recipe.model, recipe.seed, recipe.fft.epochs, recipe.fft.batch_size) == ("base", 6, 2.0, 3)
    assert base == {"model": "base", "seed": 5, "fft": {"epochs": 2.0}}
    recipe = load_recipe(write(tmp_path, "seed: 7\n"), base=base)
    assert (recipe.model, recipe.seed, recipe.fft.epochs) == (None, 7, 1.0)


def test_later_set_wins(tmp_path: Path) -> None:
    assert load_recipe(sets=["seed=1", "seed=2"]).seed == 2


def test_value_of_set_is_yaml() -> None:
    recipe = load_recipe(
        sets=["probe.groups=[4, 8]", "mask_train.layers=all", "data=a.jsonl=10", "eval.generate=false", "name="]
    )
    assert recipe.probe.groups == (4, 8)
    assert recipe.mask_train.layers == "all"
    assert recipe.data == (DataSource("a.jsonl", 10),)
    assert recipe.eval.generate is False
    assert recipe.name is None


@pytest.mark.parametrize("text", ["seed", "=3", " =3", ""])
def test_set_without_key_or_value_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--set needs a key and a value") as caught:
        load_recipe(sets=[text])
    assert caught.value.actual == text


@pytest.mark.parametrize("value", ["[1", "{a: 1, a: 2}", "a\x01", "2024-13-45"])
def test_value_of_set_that_is_not_yaml_is_a_config_error(value: str) -> None:
    with pytest.raises(ConfigError, match="--set is not valid YAML") as caught:
        load_recipe(sets=[f"name={value}"])
    assert caught.value.key == "name"


@pytest.mark.parametrize("key", ["seed.x", "fft.epochs.x"])
def test_part_of_a_value_is_a_config_error(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="no subkeys") as caught:
        load_recipe(write(tmp_path, "seed: 1\nfft: {epochs: 2}\n"), options={key: 1})
    assert caught.value.key == key


def test_section_shared_by_an_alias_is_changed_in_one_place_only(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "fft: &train {epochs: 2}\nmask_train: *train\n"), sets=["fft.epochs=5"])
    assert (recipe.fft.epochs, recipe.mask_train.epochs) == (5, 2)


# A ratio or a threshold


@pytest.mark.parametrize(("old", "new"), [("ratio", "threshold"), ("threshold", "ratio")])
def test_indicator_takes_the_place_of_the_other_one_set_before(tmp_path: Path, old: str, new: str) -> None:
    path = write(tmp_path, f"mask_train: {{preset: paper, {old}: 0.2}}\n")
    for recipe in (
        load_recipe(path, options={f"mask_train.{new}": 0.3}),
        load_recipe(path, sets=[f"mask_train.{new}=0.3"]),
        load_recipe(sets=["mask_train.preset=paper", f"mask_train.{old}=0.2"], options={f"mask_train.{new}": 0.3}),
        with_changes(load_recipe(path), {f"mask_train.{new}": 0.3}),
    ):
        assert getattr(recipe.mask_train, new) == 0.3
        assert getattr(recipe.mask_train, old) is None


@pytest.mark.parametrize(
    ("old", "new"), [("grad_accum_steps", "global_batch_size"), ("global_batch_size", "grad_accum_steps")]
)
def test_the_size_of_a_step_takes_the_place_of_the_other_one_set_before(tmp_path: Path, old: str, new: str) -> None:
    path = write(tmp_path, f"fft: {{{old}: 8}}\n")
    recipe = load_recipe(path, options={f"fft.{new}": 16})
    assert (getattr(recipe.fft, new), getattr(recipe.fft, old)) == (16, None)


def test_indicator_that_is_taken_back_replaces_nothing() -> None:
    document: dict[str, Any] = {"mask_train": {"ratio": 0.2}}
    assign(document, [("mask_train.threshold", None)])
    assert document == {"mask_train": {"ratio": 0.2, "threshold": None}}


@pytest.mark.parametrize("order", [1, -1])
def test_both_indicators_in_one_place_are_a_config_error(tmp_path: Path, order: int) -> None:
    both = {"mask_train.ratio": 0.1, "mask_train.threshold": -0.03}
    options = dict(list(both.items())[::order])
    path = write(tmp_path, "mask_train: {ratio: 0.1, threshold: -0.03}\n")
    for arguments in (
        {"options": options},
        {"sets": [f"{key}={value}" for key, value in options.items()]},
        {"name": path},
    ):
        with pytest.raises(ConfigError) as caught:
            load_recipe(**arguments)  # type: ignore[arg-type]
        assert caught.value.problems == ("mask_train: give either a ratio, a threshold or a pattern",)


@pytest.mark.parametrize("method", ["full", "lora", "hft"])
def test_exclusions_need_a_method_that_selects_entries(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(options={"fft.method": method, "fft.exclude": ["head"]})
    assert caught.value.problems == (
        f"fft: fft.exclude applies only to the methods gmt and random; the method is {method}",
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"support": "m.bits"}, "fft.support applies only to the methods shira and supertuning; the method is full"),
        (
            {"method": "supertuning", "support": "m.bits", "ratio": 0.9},
            "give either fft.ratio or fft.support, whose mask decides how many weights are trained",
        ),
        (
            {"method": "shira", "ratio": 0.9},
            "fft.ratio applies only to the methods gmt, random and supertuning; the method is shira",
        ),
    ],
)
def test_options_of_adapters_that_do_not_go_together(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(options={f"fft.{key}": value for key, value in options.items()})
    assert caught.value.problems == (f"fft: {problem}",)


@pytest.mark.parametrize("method", ["learned", "random", "drop"])
def test_rows_are_for_the_magnitude_mask(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(options={"mask_train.method": method, "mask_train.unit": "row"})
    expected = f"mask_train: mask_train.unit: row applies only to the method magnitude; the method is {method}"
    assert caught.value.problems == (expected,)


@pytest.mark.parametrize(("method", "strategy"), [("drop", "trivial"), ("drop", "salient"), ("random", "random")])
def test_only_a_random_drop_is_rescaled(method: str, strategy: str) -> None:
    options = {"mask_train.method": method, "mask_train.strategy": strategy, "mask_train.rescale": True}
    with pytest.raises(ConfigError) as caught:
        load_recipe(options=options)
    expected = "mask_train: mask_train.rescale applies only to the method drop with strategy random"
    assert caught.value.problems == (expected,)


def test_weight_masks_are_not_dropped() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(options={"mask_train.method": "drop", "mask_train.kind": "weight"})
    assert caught.value.problems == (
        "mask_train: mask_train.kind: weight does not apply to the method drop, which makes delta masks only",
    )


def test_rows_are_for_weight_masks() -> None:
    options = {"mask_train.method": "magnitude", "mask_train.unit": "row", "mask_train.kind": "delta"}
    with pytest.raises(ConfigError) as caught:
        load_recipe(options=options)
    assert caught.value.problems == (
        "mask_train: mask_train.unit: row ranks rows by their weights; it applies only to kind weight",
    )


# Checking


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"sead": 1}, "sead: unknown key; did you mean seed?"),
        ({"fft": {"epoch": 1}}, "fft.epoch: unknown key; did you mean epochs?"),
        ({"mask_train": {"ration": 1}}, "mask_train.ration: unknown key; did you mean ratio?"),
        ({"mask-train": {}}, "mask-train: unknown key; did you mean mask_train?"),
        ({"ratio": 0.1}, "ratio: unknown key; did you mean fft.ratio, delta.ratio or mask_train.ratio?"),
        ({"fft": {"threshold": 0.1}}, "fft.threshold: unknown key; did you mean mask_train.threshold?"),
        ({"eval": {"lora_rank": 8}}, "eval.lora_rank: unknown key; did you mean fft.lora_rank?"),
        ({"fft": {"seed": 3}}, "fft.seed: unknown key; did you mean seed?"),
        ({"fft": {"qqqqq": 3}}, "fft.qqqqq: unknown key"),
        (
            {"stages": {"a": {"command": "fft", "aftr": "b"}}},
            "stages.a.aftr: unknown key; did you mean after?",
        ),
    ],
)
def test_unknown_key_names_the_nearest_known_one(document: dict[str, Any], problem: str) -> None:
    assert problems_of(document) == (problem,)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("ratio", 1.0, "mask_train.ratio: input should be less than 1, got 1.0"),
        (
            "ratio",
            "much",
            "mask_train.ratio: input should be a valid number or input should be a valid dictionary or input should be "
            "'auto', got 'much'",
        ),
        ("ratio", {"q_proj": 1.5}, "mask_train.ratio.q_proj: input should be less than 1, got 1.5"),
        (
            "learning_rate",
            "fast",
            "mask_train.learning_rate: input should be a valid number or input should be 'auto', got 'fast'",
        ),
    ],
)
def test_a_key_of_several_types_is_named_once_and_without_them(key: str, value: object, problem: str) -> None:
    assert problems_of({"mask_train": {"preset": "paper", key: value}}) == (problem,)


def test_an_item_of_several_types_is_named_once() -> None:
    assert problems_of({"probe": {"groups": [4, "some"]}}) == (
        "probe.groups.1: input should be a valid integer or input should be 'all', got 'some'",
    )


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "colour: red\nseed: three\ndata: ''\nfft: {epoch: 2, epochs: 0}\nmask_train: {ratio: 0.1, threshold: 0.2}\n",
    )
    with pytest.raises(ConfigError, match="is not valid") as caught:
        load_recipe(path)
    assert caught.value.path == path
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "data",
        "seed",
        "fft.epochs",
        "fft.epoch",
        "mask_train",
        "colour",
    ]


def test_problem_says_what_was_found() -> None:
    assert problems_of({"seed": "three"}) == ("seed: input should be a valid integer, got 'three'",)


def test_keys_that_stages_change_are_checked_before_any_stage_runs() -> None:
    stages = {
        "fft": {"command": "fft", "set": {"fft.epochz": 2, "fft.batch_size": "big"}},
        "mft": {"command": "mask-train", "set": {"seed.x": 1}},
        "random": {"command": "mask-train", "set": {"mask_train.method": "random"}},
    }
    found = problems_of({"seed": 3, "stages": stages})
    assert [problem.split(":")[0] for problem in found] == [
        "stages.fft.set.fft.batch_size",
        "stages.fft.set.fft.epochz",
        "stages.mft.set.seed.x",
    ]


# Changing


def test_changes_leave_the_recipe_as_it_is_and_keep_its_other_keys() -> None:
    recipe = parse_recipe({"data": "a.jsonl=3", "mask_train": {"ratio": 0.2}, "seeds": [1, 2]})
    changed = with_changes(recipe, {"mask_train.layers": "4-7", "seed": 8, "seeds": []})
    assert (changed.mask_train.layers, changed.mask_train.ratio) == ("4-7", 0.2)
    assert (changed.data, changed.seed, changed.seeds) == (recipe.data, 8, ())
    assert (recipe.mask_train.layers, recipe.seed, recipe.seeds) == (None, 0, (1, 2))


def test_unknown_change_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as caught:
        with_changes(parse_recipe({}), {"fft.epoch": 3})
    assert caught.value.problems == ("fft.epoch: unknown key; did you mean epochs?",)


def test_a_single_command_has_no_stages_to_fit(tmp_path: Path) -> None:
    stages = "stages:\n  random: {command: mask-train, set: {mask_train.method: random}}\n"
    path = write(tmp_path, stages)
    options = {"mask_train.preset": "paper", "mask_train.threshold": 0.0}
    with pytest.raises(ConfigError):
        load_recipe(path, options=options)
    assert load_recipe(path, options=options, stages=False).mask_train.threshold == 0.0


# Extending


def write_recipe(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_extends_others_key_by_key(tmp_path: Path) -> None:
    write_recipe(tmp_path, "_data.yaml", "data: a.jsonl\nfft: {epochs: 3, batch_size: 2}\n")
    write_recipe(tmp_path, "_stages.yaml", "stages:\n  fft: {command: fft}\n  mft: {command: mask-train, after: fft}\n")
    path = write_recipe(
        tmp_path,
        "deep/one.yaml",
        "extends: [../_data.yaml, ../_stages.yaml]\nfft: {epochs: 5}\nstages:\n  mft: null\n  end: {command: eval}\n",
    )
    recipe = load_recipe(str(path))
    assert (recipe.fft.epochs, recipe.fft.batch_size, recipe.data[0].path) == (5, 2, "a.jsonl")
    assert list(recipe.stages) == ["fft", "end"]


def test_a_later_extended_recipe_wins_over_an_earlier_one(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.yaml", "seed: 1\nfft: {max_steps: 4}\n")
    write_recipe(tmp_path, "b.yaml", "extends: a.yaml\nseed: 2\n")
    path = write_recipe(tmp_path, "c.yaml", "extends: [b.yaml]\nfft: {max_steps: null}\n")
    assert (load_recipe(str(path)).seed, load_recipe(str(path)).fft.max_steps) == (2, None)


def test_a_built_in_recipe_is_extended_by_its_name(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "mine.yaml", "extends: quickstart\nfft: {epochs: 1}\n")
    assert load_recipe(str(path)).fft.epochs == 1
    assert "mft" in load_recipe(str(path)).stages


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write_recipe(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="in a cycle") as caught:
        load_recipe(str(path))
    assert caught.value.actual == "b.yaml -> a.yaml -> b.yaml"


def test_an_extended_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "a.yaml", "extends: quikstart\n")
    with pytest.raises(ConfigError, match="recipe does not exist") as caught:
        load_recipe(str(path))
    assert (caught.value.path, caught.value.hint) == ("quikstart", "did you mean quickstart?")


def test_extends_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "a.yaml", "extends: {a: 1}\n")
    with pytest.raises(ConfigError, match="extends must name recipes") as caught:
        load_recipe(str(path))
    assert caught.value.key == "extends"


# Bounds


def test_diamonds_of_recipes_are_read_once_each(tmp_path: Path) -> None:
    for level in range(18):
        following = f"extends: [{level + 1}.yaml, {level + 1}.yaml]\n" if level < 17 else "seed: 5\n"
        (tmp_path / f"{level}.yaml").write_text(following)
    assert load_recipe(str(tmp_path / "0.yaml")).seed == 5


def test_a_chain_of_too_many_recipes_is_refused(tmp_path: Path) -> None:
    for level in range(66):
        (tmp_path / f"{level}.yaml").write_text(f"extends: {level + 1}.yaml\n" if level < 65 else "seed: 5\n")
    with pytest.raises(ConfigError, match="are too large") as caught:
        load_recipe(str(tmp_path / "0.yaml"))
    assert "at most 64 recipe names" in str(caught.value.expected)
    assert load_recipe(str(tmp_path / "1.yaml")).seed == 5


@pytest.mark.slow
def test_extended_recipes_that_are_too_large_together_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.yaml").write_text(f"{name}: [{'1, ' * 2000}]\n")
    path = write(tmp_path, "extends: [a.yaml, b.yaml, c.yaml]\n")
    with pytest.raises(ConfigError, match="are too large") as caught:
        load_recipe(path)
    assert caught.value.path == str(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "a\\0b"])
def test_extended_name_that_no_file_can_have_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="The recipe does not exist"):
        load_recipe(write(tmp_path, f'extends: "{name}"\n'))


@pytest.mark.slow
def test_of_many_problems_the_first_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"k{number}: 1\n" for number in range(2000)))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[0] == "k0: unknown key"
    assert caught.value.problems[-1] == "and 1,980 more"


def test_a_long_value_is_cut_in_the_message() -> None:
    (problem,) = problems_of({"seed": "x" * 100_000})
    assert problem.startswith("seed: input should be a valid integer, got 'xxx")
    assert len(problem) < 300


def test_exponential_sweeps_are_counted_and_not_expanded() -> None:
    keys = ("epochs", "max_steps", "batch_size", "lora_rank", "lora_alpha", "val_steps", "patience", "batch_tokens")
    stage = {"command": "fft", "sweep": {f"fft.{key}": list(range(1, 11)) for key in keys}}
    with pytest.raises(ConfigError, match="too many stages") as caught:
        parse_recipe({"stages": {"s": stage}})
    assert (caught.value.expected, caught.value.actual) == (
        "at most 1,000 stages, counting all seeds and swept values",
        "100,000,000",
    )
    with pytest.raises(ConfigError, match="too many stages"):
        parse_recipe({"seeds": list(range(1001)), "stages": {"s": {"command": "fft"}}})
