"""The recipes shipped in the package: each loads, can be planned, and matches the published settings."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

import pytest

from mftctl.cli.app import load_command
from mftctl.data.files import Record
from mftctl.data.formats import to_example
from mftctl.data.trees import conversations, is_message
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS, expand_groups
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.jobs import Job, spell_out
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import BUILT_IN_FOLDER, built_in_names, load_recipe
from mftctl.experiments.recipe_yaml import read_yaml
from mftctl.training.schedule import records_per_step

NAMES = built_in_names()
FOUNDATIONS = ("quickstart", "smollm2/gsm8k", "vision/shapes")
FILES = sorted(path for path in BUILT_IN_FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")

BACKBONES = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", "llama"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", "llama"),
    "deepseek-coder-6.7b": ("deepseek-ai/deepseek-coder-6.7b-base", "llama"),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", "llama"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"),
}

# MFT, section 3.2 and appendix A.1: learning rate and best layers per domain.
MFT = {
    "llama2-7b": (2e-5, {"math": "4-7", "coding": "20-23", "instruction": "0-3"}),
    "llama3.1-8b": (5e-6, {"math": "24-27", "coding": "20-23", "instruction": "24-27"}),
}
DOMAINS = [(backbone, domain) for backbone, (_, layers) in MFT.items() for domain in layers]
MFT_TRAINING: dict[str, Any] = {"epochs": 2, "global_batch_size": 128, "batch_size": 1, "max_length_tokens": 4096}
MFT_TRAINING |= {"schedule": "linear", "warmup_ratio": 0.03, "weight_decay": 0.0}
MFT_TRAINING |= {"precision": "bf16", "gradient_checkpointing": True}

# GMT, table 4: the share of weights left unchanged.
GMT_RATIOS = {
    "mistral-7b/math-gmt": 0.2,
    "llama3-8b/math-gmt": 0.3,
    "mistral-7b/code-gmt": 0.1,
    "deepseek-coder-6.7b/code-gmt": 0.3,
    "llama2-7b/general-gmt": 0.4,
    "llama2-13b/general-gmt": 0.1,
}

# Sample values for the columns of each hub data set.
TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
MESSAGES = {"id": "0", "messages": TURNS}
SPOKEN = [{"from": "User", "value": "1 + 1?"}, {"from": "Assistant", "value": "2"}]
TREE = {"message_id": "a", "parent_id": None, "role": "prompter", "lang": "en", "text": "1 + 1?"}
PERSONAS = ("math", "math-grade", "algebra", "code", "instruction-following")
COLUMNS: dict[str, dict[str, Any]] = {
    **{f"allenai/tulu-3-sft-personas-{kind}": {**MESSAGES, "prompt": "1 + 1?"} for kind in PERSONAS},
    "meta-math/MetaMathQA": {"type": "t", "query": "1 + 1?", "original_question": "1 + 1?", "response": "2"},
    "AI-MO/NuminaMath-TIR": {"problem": "1 + 1?", "solution": "2", "messages": TURNS},
    "AI-MO/NuminaMath-CoT": {"source": "s", "problem": "1 + 1?", "solution": "2", "messages": TURNS},
    "theblackcat102/evol-codealpaca-v1": {"instruction": "1 + 1?", "output": "2"},
    "m-a-p/CodeFeedback-Filtered-Instruction": {"query": "1 + 1?", "answer": "2", "resource": "r", "lang": "l"},
    "OpenAssistant/oasst1": TREE,
    "OpenAssistant/oasst2": TREE,
    "allenai/coconot:original": {"id": "0", "category": "c", "prompt": "1 + 1?", "response": "2"},
    "CohereForAI/aya_dataset": {"inputs": "1 + 1?", "targets": "2", "language": "English"},
    "nvidia/Daring-Anteater": {"system": "", "mask": "User", "conversations": SPOKEN},
    "ise-uiuc/Magicoder-Evol-Instruct-110K": {"instruction": "1 + 1?", "response": "2"},
    "allenai/tulu-v2-sft-mixture": {"dataset": "d", **MESSAGES},
    "Open-Orca/OpenOrca": {"id": "0", "system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"},
    "sahil2801/CodeAlpaca-20k": {"instruction": "1 + 1?", "input": "", "output": "2"},
    "openai/gsm8k:main": {"question": "1 + 1?", "answer": "2"},
    "google-research-datasets/mbpp:full": {"task_id": 1, "text": "1 + 1?", "code": "2", "test_list": ["assert 1"]},
}


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


@cache
def tasks_of(name: str) -> tuple[Job, ...]:
    return tuple(spell_out(recipe_of(name)))


def stage_tasks(name: str, stage: str) -> list[Job]:
    """The tasks of one stage, including all swept values."""
    found = [task for task in tasks_of(name) if task.name.partition("[")[0] == stage]
    assert found, f"{name} has no stage {stage}"
    return found


def task_of(name: str, stage: str) -> Job:
    (task,) = stage_tasks(name, stage)
    return task


def evaluated(name: str) -> set[str]:
    """Models and benchmarks that a recipe evaluates: the rows of its table."""
    return {task.label for task in tasks_of(name) if task.command == "eval"}


def header(name: str) -> list[str]:
    """The comment lines at the top of a recipe, without `#`."""
    lines = (BUILT_IN_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:first]]


def commands(name: str) -> list[list[str]]:
    """The words of each command in a recipe's header, with continuation lines joined."""
    text = "\n".join(header(name)).partition("Command:")[2].replace("\\\n", "")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def settings(name: str) -> dict[str, Any]:
    """All settings of a recipe except its name."""
    return recipe_of(name).model_dump(mode="json", exclude={"name", "description"})


# Every recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_is_spelled_out(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.name == name.replace("/", "-")
    assert recipe.description
    assert {task.command for task in tasks_of(name)} >= {"fft"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_headed_by_purpose_source_hardware_and_command(name: str) -> None:
    lines = header(name)
    assert len(lines[0]) > 20
    for item in ("Source:", "Hardware:", "Command:"):
        (line,) = [line for line in lines if line.startswith(item)]
        assert line.removeprefix(item).strip()
    source = " ".join(lines).partition("Source:")[2]
    assert "arXiv 2503.22764" in source or "arXiv 2406.15330" in source
    assert re.search(r"\b(table|figure)s? \d", source)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_the_header_runs_this_recipe(name: str) -> None:
    run = load_command("run")
    given = commands(name)
    assert given
    for words in given:
        assert words[:3] == ["mftctl", "run", name]
        assert run.make_context("run", words[2:]).params["recipe"] == name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.partition("/")[0] in BACKBONES and name not in FOUNDATIONS]
)
def test_recipe_is_for_the_model_of_its_folder(name: str) -> None:
    recipe = recipe_of(name)
    assert (recipe.model, recipe.model_type) == BACKBONES[name.partition("/")[0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_evaluation_measures_something(name: str) -> None:
    for task in tasks_of(name):
        if task.command == "eval":
            assert task.recipe.eval.tasks or task.recipe.test_data
            assert set(expand_groups(task.recipe.eval.tasks)) <= set(BENCHMARKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_methods_that_select_have_a_ratio_and_layers(name: str) -> None:
    for task in tasks_of(name):
        fft, mask = task.recipe.fft, task.recipe.mask_train
        if task.command == "fft" and fft.method in ("gmt", "random"):
            assert "ratio" in fft.model_fields_set
        if task.command == "mask-train":
            by_default = mask.preset == "default" or mask.method in ("random", "magnitude")
            assert by_default or {"ratio", "threshold"} & mask.model_fields_set
            has_layers = mask.layers is not None or task.layers_from is not None
            assert has_layers or mask.method == "drop" or mask.target == "projector"


def test_no_two_recipes_do_the_same() -> None:
    names = [name for index, name in enumerate(NAMES) if settings(name) in [settings(other) for other in NAMES[:index]]]
    assert names == []


def test_every_part_is_used() -> None:
    used = set()
    for path in FILES:
        extended = read_yaml(path).get("extends", [])
        for other in [extended] if isinstance(extended, str) else extended:
            used.add((path.parent / other).resolve())
    parts = {path.resolve() for path in FILES if path.name.startswith("_")}
    assert parts
    assert parts - used == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FOUNDATIONS])
def test_recipe_repeats_few_settings(name: str) -> None:
    document = read_yaml(BUILT_IN_FOLDER / f"{name}.yaml")
    assert document["extends"]
    assert not {"model", "model_type", "data", "val_data", "test_data", "eval"} & set(document)


def test_the_overview_lists_every_recipe_once_with_its_command() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| `(.+?)` \|$", (BUILT_IN_FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == NAMES
    assert all(command == f"mftctl run {name}" for name, _, command in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.partition("/")[0] in BACKBONES])
@pytest.mark.parametrize("world_size", [1, 8])
def test_a_step_has_the_same_records_on_any_number_of_gpus(name: str, world_size: int) -> None:
    small = name.startswith("smollm2/")
    for task in tasks_of(name):
        options = task.recipe.fft if task.command == "fft" else task.recipe.mask_train
        if task.command == "fft" or (
            task.command in ("mask-train", "probe") and task.recipe.mask_train.method != "drop"
        ):
            assert options.global_batch_size == records_per_step(options, world_size) == (8 if small else 128)


# Mask Fine-Tuning


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
@pytest.mark.parametrize("suffix", ["", "-mixed", "-probe", "-ratio", "-data"])
def test_mft_trains_as_published(backbone: str, domain: str, suffix: str) -> None:
    rate, layers = MFT[backbone]
    recipe = recipe_of(f"{backbone}/{domain}{suffix}")
    for section in (recipe.fft, recipe.mask_train):
        assert section.learning_rate == rate
        assert {key: getattr(section, key) for key in MFT_TRAINING} == MFT_TRAINING
    mask = recipe.mask_train
    assert (mask.layers, mask.ratio, mask.threshold) == (layers[domain], 0.1, None)
    assert (mask.method, mask.target, mask.ranking, mask.start) == (
        "learned",
        "both",
        "absolute",
        "normal",
    )
    assert (mask.preset, mask.patience) == ("paper", None)


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
@pytest.mark.parametrize("suffix", ["", "-mixed"])
def test_mft_table_has_all_rows(backbone: str, domain: str, suffix: str) -> None:
    name = f"{backbone}/{domain}{suffix}"
    tuned = {"pretrained", "lora", "continued-lora", "fft", "continued"}
    assert evaluated(name) == tuned | {"random", "l1", "l1-rows", "apply"}
    masks = {stage: task_of(name, stage).recipe.mask_train for stage in ("random", "l1", "l1-rows", "mft")}
    assert {stage: (mask.method, mask.unit) for stage, mask in masks.items()} == {
        "random": ("random", "weight"),
        "l1": ("magnitude", "weight"),
        "l1-rows": ("magnitude", "row"),
        "mft": ("learned", "weight"),
    }
    assert [task_of(name, stage).recipe.fft.method for stage in ("lora", "continued-lora")] == ["lora", "lora"]
    before = {task.name: task.after.name if task.after else None for task in tasks_of(name)}
    assert {before[stage] for stage in ("continued", *masks)} == {"fft"}
    assert (before["lora"], before["continued-lora"], before["fft"], before["apply"]) == (None, "lora", None, "mft")
    assert (task_of(name, "fft").recipe.fft.keep, task_of(name, "continued").recipe.fft.keep) == ("best", "last")


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
def test_mixed_domain_trains_weights_on_all_data_and_masks_on_one_domain(backbone: str, domain: str) -> None:
    name = f"{backbone}/{domain}-mixed"
    everything = [source for other in MFT[backbone][1] for source in recipe_of(f"{backbone}/{other}").data]
    for stage in ("lora", "continued-lora", "fft", "continued"):
        assert list(task_of(name, stage).recipe.data) == everything
    for stage in ("random", "l1", "l1-rows", "mft"):
        assert task_of(name, stage).recipe.data == recipe_of(f"{backbone}/{domain}").data


def test_mft_mixes_the_published_counts() -> None:
    counts = {domain: [source.count for source in recipe_of(f"llama2-7b/{domain}").data] for _, domain in DOMAINS}
    assert counts == {
        "math": [10_000] * 6,
        "coding": [10_000] * 3,
        "instruction": [10_000, 7_000, 9_000, 10_000, 10_000, 10_000],
    }


@pytest.mark.parametrize("backbone", MFT)
def test_global_mft_has_the_published_threshold_on_all_layers(backbone: str) -> None:
    name = f"{backbone}/math-global"
    mask = task_of(name, "mft").recipe.mask_train
    assert (mask.layers, mask.threshold, mask.ratio) == ("all", -0.035, None)
    assert {task.label for task in tasks_of(name) if task.command == "eval"} == {
        "pretrained",
        "fft",
        "continued",
        "mft",
    }


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
def test_mft_probes_groups_of_4_8_and_16_on_a_tenth_of_the_data(backbone: str, domain: str) -> None:
    probe = task_of(f"{backbone}/{domain}-probe", "probe")
    assert probe.recipe.probe.groups == (4, 8, 16)
    assert probe.recipe.probe.data_fraction == 0.1
    assert probe.recipe.probe.by == {"math": "gsm8k", "coding": "humaneval", "instruction": "ifeval"}[domain]
    assert probe.after is task_of(f"{backbone}/{domain}-probe", "fft")


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
def test_mft_sweeps_ratio_and_data(backbone: str, domain: str) -> None:
    ratios = [task.recipe.mask_train.ratio for task in stage_tasks(f"{backbone}/{domain}-ratio", "mft")]
    assert ratios == [0.02, 0.05, 0.1, 0.2, 0.4]
    shares = [task.recipe.mask_train.data_fraction for task in stage_tasks(f"{backbone}/{domain}-data", "mft")]
    assert shares == [0.1, 0.25, 0.5, 0.75, 1.0]
    for suffix in ("ratio", "data"):
        assert len(stage_tasks(f"{backbone}/{domain}-{suffix}", "results")) == 6


@pytest.mark.parametrize(("backbone", "domain"), DOMAINS)
def test_recipes_of_one_domain_share_their_fine_tuning(backbone: str, domain: str) -> None:
    """All settings that decide its result are equal, so it is trained once per runs folder."""
    names = [f"{backbone}/{domain}{suffix}" for suffix in ("", "-probe", "-ratio", "-data")]
    names += [f"{backbone}/math-global"] if domain == "math" else []
    first, *others = [deciding_keys(task_of(name, "fft").recipe, "fft") for name in names]
    assert all(other == first for other in others)


# Gradient-Mask Tuning


@pytest.mark.parametrize("name", [name for name in NAMES if "gmt" in name or name == "mistral-7b/math-drop"])
def test_gmt_trains_as_published(name: str) -> None:
    for task in tasks_of(name):
        if task.command == "fft":
            assert (task.recipe.fft.schedule, task.recipe.fft.warmup_ratio) == ("cosine", 0.03)
            assert task.recipe.fft.weight_decay == 0.0
            assert task.recipe.fft.precision == ("auto" if name.startswith("smollm2") else "bf16")


@pytest.mark.parametrize(("name", "ratio"), GMT_RATIOS.items())
def test_gmt_table_has_the_published_ratio(name: str, ratio: float) -> None:
    for stage, method in (("random-update", "random"), ("gmt", "gmt")):
        fft = task_of(name, stage).recipe.fft
        assert (fft.method, fft.ratio, fft.scope) == (method, ratio, "tensor")
    assert task_of(name, "hft").recipe.fft.method == "hft"
    assert task_of(name, "fft").recipe.fft.method == "full"
    if "general" not in name:
        drop = task_of(name, "drop")
        assert (drop.recipe.mask_train.strategy, drop.recipe.mask_train.ratio) == ("trivial", ratio)
        assert drop.after is task_of(name, "fft")


@pytest.mark.parametrize("name", GMT_RATIOS)
def test_gmt_table_has_all_rows_that_can_be_evaluated(name: str) -> None:
    general = {"pretrained", "fft", "hft", "random-update", "gmt"}
    expected = {"code": {*general, "drop"}, "math": {*general, "drop"}, "general": {*general, "pretrained-pass-at-10"}}
    assert evaluated(name) == expected[name.partition("/")[2].removesuffix("-gmt")]


@pytest.mark.parametrize("name", ["llama2-7b/general-gmt", "llama2-13b/general-gmt"])
def test_the_general_table_of_gmt_has_humaneval_by_ten_answers(name: str) -> None:
    tasks = [*stage_tasks(name, "pass-at-10"), *stage_tasks(name, "pretrained-pass-at-10")]
    assert len(tasks) == 5
    for task in tasks:
        asked = task.recipe.eval
        assert (asked.tasks, asked.samples, asked.temperature) == (("humaneval",), 10, 0.8)


@pytest.mark.parametrize("name", [*(name for name in NAMES if name.endswith("-gmt-ratio")), "smollm2/gmt"])
def test_gmt_sweeps_its_ratio(name: str) -> None:
    ratios = [task.recipe.fft.ratio for task in stage_tasks(name, "gmt")]
    assert ratios == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    assert {task.recipe.fft.method for task in stage_tasks(name, "gmt")} == {"gmt"}


@pytest.mark.parametrize("name", ["mistral-7b/math-drop", "smollm2/drop"])
def test_one_off_drop_sweeps_strategy_and_ratio(name: str) -> None:
    tasks = stage_tasks(name, "drop")
    found = {(task.recipe.mask_train.strategy, task.recipe.mask_train.ratio) for task in tasks}
    assert found == {(s, tenth / 10) for s in ("trivial", "salient", "random") for tenth in range(1, 10)}
    assert len(tasks) == 27
    assert {task.recipe.mask_train.method for task in tasks} == {"drop"}


def test_settings_that_gmt_omits_are_marked_alike() -> None:
    """The paper omits learning rate, epochs, batch and length; each such line says `chosen` and names its source."""
    backbones = {name.partition("/")[0] for name in GMT_RATIOS}
    files = {BUILT_IN_FOLDER / backbone / "_backbone.yaml": ["learning_rate"] for backbone in sorted(backbones)}
    files[BUILT_IN_FOLDER / "_gmt.yaml"] = ["epochs", "global_batch_size", "max_length_tokens"]
    for path, keys in files.items():
        section = path.read_text(encoding="utf-8").partition("\nfft:\n")[2].partition("\n\n")[0]
        for key in keys:
            [line] = [line for line in section.splitlines() if line.strip().startswith(f"{key}:")]
            assert re.search(r"  # .*\bchosen: [A-Z]", line), (path, line)
        stated = [line for line in section.splitlines() if line.strip().partition(":")[0] not in keys]
        assert not any("chosen" in line for line in stated), path


@pytest.mark.parametrize(("name", "ratio"), [("mistral-7b/code-gmt-speed", 0.1), ("llama2-13b/general-gmt-speed", 0.1)])
def test_gmt_speed_times_the_three_methods_of_its_table(name: str, ratio: float) -> None:
    found = {task.name: (task.recipe.fft.method, task.recipe.fft.ratio) for task in tasks_of(name)}
    assert found == {"fft": ("full", None), "random-update": ("random", ratio), "gmt": ("gmt", ratio)}
    assert {task.recipe.fft.max_steps for task in tasks_of(name)} == {50}


def test_the_small_table_has_every_method_of_both_papers() -> None:
    drops = {f"drop[strategy={strategy}]" for strategy in ("trivial", "salient", "random")}
    trained = {"lora", "continued-lora", "fft", "continued", "hft", "random-update", "gmt", "gmt-global"}
    masks = {"random", "l1", "l1-rows", "apply", "mft-global"}
    assert evaluated("smollm2/table") == {"pretrained"} | trained | drops | masks
    mask = task_of("smollm2/table", "mft-global").recipe.mask_train
    assert (mask.layers, mask.threshold, mask.ratio) == ("all", -0.035, None)
    assert task_of("smollm2/table", "gmt-global").recipe.fft.scope == "global"


def test_the_small_probe_chooses_the_layers_of_its_mask() -> None:
    mft = task_of("smollm2/probe", "mft")
    assert mft.layers_from is task_of("smollm2/probe", "probe")
    assert (mft.recipe.mask_train.max_steps, mft.layers_from.recipe.mask_train.max_steps) == (16, 4)


# Data


def test_the_columns_of_every_data_set_are_known() -> None:
    paths = {source.path for name in NAMES for task in tasks_of(name) for source in task.recipe.data}
    assert {path for path in paths if "/" in path and not path.startswith("quickstart/")} == set(COLUMNS)


@pytest.mark.parametrize("path", COLUMNS)
def test_every_data_set_is_read_as_questions_with_answers(path: str) -> None:
    record = Record(path, COLUMNS[path])
    if is_message(record):
        reply = Record(path, {**TREE, "message_id": "2", "parent_id": TREE["message_id"], "role": "assistant"})
        (record,) = conversations([record, reply])
    assert to_example(record.fields, path).answer.strip()


def test_the_built_in_probe_tries_all_layers_except_where_its_stage_is_the_papers() -> None:
    assert recipe_of("quickstart").probe.groups == (4, "all")
    assert task_of("quickstart", "probe").recipe.probe.groups == (4,)
