"""Options shared by several commands, with help and defaults taken from the recipe fields.

A command parameter that sets a recipe field has the name of that field; `given` collects them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mftctl.cli import completion
from mftctl.data.prepared.cache_folder import OFF as CACHE_OFF
from mftctl.data.prepared.cache_folder import VARIABLE as CACHE
from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import AUTO, MaskTrainOptions
from mftctl.experiments.recipe import EvalOptions, Recipe
from mftctl.experiments.recipe_yaml import parse_yaml
from mftctl.experiments.training_options import TrainingOptions
from mftctl.workflows.multi_process.process_count import Shard

INPUT = "Input and output"
TRAINING = "Training"
MASKING = "Mask"
METHOD = "Method"
INTERIM = "Evaluation during training"
SCORE = "Score"
RECORDS = "Records and chat template"
GENERAL = "General"

_LISTED_CHARACTERS = 24
"""Longer lists of choices would squeeze the help column, which names the choices anyway."""


def setting(
    owner: type[BaseModel],
    field: str,
    *flags: str,
    panel: str,
    default: str | None = None,
    parser: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    offered: Callable[..., list[str]] | None = None,
) -> Any:
    """Returns the Typer option for a recipe field, with its description and default.

    Args:
        owner: The recipe section that has the field.
        field: Name of the field.
        flags: Spellings on the command line.
        panel: The help panel it is shown in.
        default: The default to show where that of the field is not informative; empty for none.
        parser: Converts the text to a value where a plain type does not suffice.
        metavar: Placeholder for the value in the help; by default its choices or its type.
        offered: Returns what a shell offers for the value; by default the choices.
    """
    info: FieldInfo = owner.model_fields[field]
    choices = [choice for part in (info.annotation, *get_args(info.annotation)) for choice in _literals(part)]
    listed = "|".join(choices)
    shown = default if default is not None else None if info.default in (None, ()) else str(info.default)
    return typer.Option(
        *flags,
        help=info.description,
        show_default=shown or False,
        metavar=metavar or _metavar(listed, choices, parser),
        parser=parser,
        rich_help_panel=panel,
        autocompletion=offered or (completion.choices(choices) if choices else None),
    )


def _metavar(listed: str, choices: list[str], parser: Callable[[str], Any] | None) -> str | None:
    if len(choices) > 1 and len(listed) <= _LISTED_CHARACTERS:
        return listed
    return "<str>" if parser else None


def _literals(annotation: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()


def group_sizes(text: str) -> list[int | str]:
    """Parses group sizes such as `4` or `4,8,16,all`.

    Raises:
        ConfigError: The text has another form.
    """
    try:
        return [size if size == "all" else int(size) for size in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "Group sizes must be whole numbers or 'all'.", key="--groups", expected="4 or 4,8,all", actual=text
        ) from error


def ratios(text: str) -> float | str | dict[str, float]:
    """Parses a ratio such as `0.1`, one per projection as in `q_proj=0.05,down_proj=0.1`, or `auto`.

    Raises:
        ConfigError: The text has another form.
    """
    try:
        if text == AUTO:
            return text
        if "=" not in text:
            return float(text)
        parts = [part.partition("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, _, value in parts}
    except ValueError as error:
        raise ConfigError(
            "--ratio takes one share, one per projection, or auto.",
            key="--ratio",
            expected="0.1, q_proj=0.05,down_proj=0.1 or auto",
            actual=text,
        ) from error


def names(text: str) -> list[str]:
    """Splits comma-separated names such as `gsm8k,math`."""
    return text.split(",")


def numbers(text: str) -> list[float]:
    """Splits comma-separated numbers such as `0.5,1`.

    Raises:
        ConfigError: A part is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "The list must consist of numbers with commas between them.", expected="such as 0.5,1", actual=text
        ) from error


def files_by_task(pairs: list[str]) -> dict[str, str]:
    """Returns files by task from texts such as `gsm8k=test.jsonl`, one per option.

    Raises:
        ConfigError: A file has no task name.
    """
    files = {}
    for pair in pairs:
        task, separator, file = pair.partition("=")
        if not separator:
            raise ConfigError(
                "A benchmark file needs the name of its task.", key="--task-data", expected="NAME=PATH", actual=pair
            )
        files[task] = file
    return files


def template_variables(pairs: list[str]) -> dict[str, bool | int | float | str]:
    """Returns template variables from texts such as `enable_thinking=false`, one per option; values are read as YAML.

    Raises:
        ConfigError: A variable has no name, or its value is not a scalar.
    """
    values = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        try:
            value = (parse_yaml(text, "The value") if text else "") if separator and name else None
        except ConfigError:  # for example {{, which is plain text
            value = text
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                "A chat template variable needs a name and a value.",
                key="--template-arg",
                expected="NAME=VALUE, such as enable_thinking=false",
                actual=pair,
            )
        values[name] = value
    return values


def number_or_word(text: str) -> float | str:
    """Returns a number if the text is one; other text is left for the recipe to validate."""
    try:
        return float(text)
    except ValueError:
        return text


def whole_number_or_word(text: str) -> int | str:
    """Returns a whole number if the text is one; other text is left for the recipe to validate."""
    return int(text) if text.isdecimal() else text


def _turn_off_cache(is_off: bool) -> bool:
    """Turns the cache of prepared data off for this process and those that it starts."""
    if is_off:
        os.environ[CACHE] = CACHE_OFF
    return is_off


Model = Annotated[
    str | None,
    setting(Recipe, "model", "--model", "-m", panel=INPUT, default="the latest suitable run's"),
]
Data = Annotated[list[str] | None, setting(Recipe, "data", "--data", "-d", panel=INPUT, default="the source run's")]
ValData = Annotated[list[str] | None, setting(Recipe, "val_data", "--val-data", panel=INPUT)]
ValFraction = Annotated[float | None, setting(Recipe, "val_fraction", "--val-fraction", panel=INPUT)]
RetainData = Annotated[list[str] | None, setting(Recipe, "retain_data", "--retain", panel=INPUT)]
ChatTemplate = Annotated[
    str | None,
    setting(Recipe, "chat_template", "--chat-template", panel=RECORDS, metavar="FILE|NAME", default="the tokenizer's"),
]
TemplateArgs = Annotated[
    list[str] | None,
    setting(Recipe, "template_args", "--template-arg", panel=RECORDS, metavar="NAME=VALUE", default=""),
]
MergeSystem = Annotated[bool | None, setting(Recipe, "merge_system", "--merge-system/--no-merge-system", panel=RECORDS)]
LearnAnswers = Annotated[str | None, setting(Recipe, "learn", "--learn", panel=RECORDS)]
BadRecords = Annotated[str | None, setting(Recipe, "bad_records", "--bad-records", panel=RECORDS)]
BadRecordsMax = Annotated[
    str | None,
    setting(Recipe, "bad_records_max", "--bad-records-max", panel=RECORDS, metavar="SHARE", default="1%"),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Recipe file, or the name of a built-in recipe.",
        rich_help_panel=INPUT,
        autocompletion=completion.recipes,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=VALUE",
        help="Set any recipe key; repeatable.",
        rich_help_panel=INPUT,
        autocompletion=completion.settings,
    ),
]
Runs = Annotated[
    Path, typer.Option("--runs", help="Folder that contains all runs.", rich_help_panel=GENERAL, envvar="MFTCTL_RUNS")
]
Seed = Annotated[int | None, setting(Recipe, "seed", "--seed", panel=GENERAL)]
Device = Annotated[str | None, setting(Recipe, "device", "--device", panel=GENERAL)]
Attention = Annotated[str | None, setting(Recipe, "attention", "--attention", panel=GENERAL)]
Track = Annotated[list[str] | None, setting(Recipe, "track", "--track", panel=GENERAL, metavar="NAME")]
TrustRemoteCode = Annotated[
    bool | None, setting(Recipe, "trust_remote_code", "--trust-remote-code", panel=GENERAL, default="off")
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Prepare the data for this command only.",
        callback=_turn_off_cache,
        rich_help_panel=GENERAL,
    ),
]
NoControls = Annotated[
    bool,
    typer.Option(
        "--no-controls",
        help="Compare masks without training the controls: the same as --set controls=[].",
        rich_help_panel=GENERAL,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.", rich_help_panel=GENERAL)]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Replace existing results without asking.", rich_help_panel=GENERAL)
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume the latest run that was stopped or killed.", rich_help_panel=GENERAL),
]

Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Number of processes on this machine that share the work, one per GPU if there are GPUs.",
        show_default="1",
        rich_help_panel=GENERAL,
    ),
]
ShardOption = Annotated[
    Shard | None,
    typer.Option(
        "--shard",
        help="Split across processes during training: only the records (ddp), or the model and its state too.",
        show_default="ddp",
        rich_help_panel=GENERAL,
    ),
]

Epochs = Annotated[float | None, setting(TrainingOptions, "epochs", "--epochs", panel=TRAINING)]
MaxSteps = Annotated[int | None, setting(TrainingOptions, "max_steps", "--max-steps", panel=TRAINING)]
BatchSize = Annotated[int | None, setting(TrainingOptions, "batch_size", "--batch-size", panel=TRAINING)]
GradAccum = Annotated[int | None, setting(TrainingOptions, "grad_accum_steps", "--grad-accum", panel=TRAINING)]
GlobalBatch = Annotated[
    int | None, setting(TrainingOptions, "global_batch_size", "--global-batch-size", panel=TRAINING)
]
BatchTokens = Annotated[int | None, setting(TrainingOptions, "batch_tokens", "--batch-tokens", panel=TRAINING)]
MaxLength = Annotated[int | None, setting(TrainingOptions, "max_length_tokens", "--max-length", panel=TRAINING)]
Precision = Annotated[str | None, setting(TrainingOptions, "precision", "--precision", panel=TRAINING)]
Checkpointing = Annotated[
    bool | None,
    setting(
        TrainingOptions,
        "gradient_checkpointing",
        "--gradient-checkpointing/--no-gradient-checkpointing",
        panel=TRAINING,
    ),
]
LowMemory = Annotated[
    bool | None, setting(MaskTrainOptions, "low_memory", "--low-memory/--no-low-memory", panel=TRAINING)
]
FftLowMemory = Annotated[bool | None, setting(FftOptions, "low_memory", "--low-memory/--no-low-memory", panel=TRAINING)]
PrefixCache = Annotated[
    float | None,
    setting(MaskTrainOptions, "prefix_cache_gb", "--prefix-cache-gb", panel=TRAINING, default="by free memory"),
]
BestBy = Annotated[
    str | None,
    setting(TrainingOptions, "best_by", "--best-by", panel=TRAINING, metavar="loss|exact_match|TASK"),
]
Schedule = Annotated[str | None, setting(TrainingOptions, "schedule", "--schedule", panel=TRAINING)]
Objective = Annotated[str | None, setting(TrainingOptions, "objective", "--objective", panel=TRAINING)]
Beta = Annotated[float | None, setting(TrainingOptions, "beta", "--beta", panel=TRAINING)]
LengthNormalized = Annotated[
    bool | None,
    setting(TrainingOptions, "length_normalized", "--length-normalized/--no-length-normalized", panel=TRAINING),
]
RetainWeight = Annotated[float | None, setting(TrainingOptions, "retain_weight", "--retain-weight", panel=TRAINING)]
Average = Annotated[str | None, setting(TrainingOptions, "average", "--average", panel=TRAINING)]
AverageDevice = Annotated[str | None, setting(TrainingOptions, "average_device", "--average-device", panel=TRAINING)]
Deterministic = Annotated[
    bool | None,
    setting(TrainingOptions, "deterministic", "--deterministic", panel=TRAINING),
]
CheckMemory = Annotated[
    bool | None, setting(Recipe, "check_memory", "--check-memory/--no-check-memory", panel=TRAINING)
]
ValSteps = Annotated[int | None, setting(TrainingOptions, "val_steps", "--val-steps", panel=TRAINING)]
Patience = Annotated[int | None, setting(TrainingOptions, "patience", "--patience", panel=TRAINING)]
MaskPatience = Annotated[int | None, setting(MaskTrainOptions, "patience", "--patience", panel=TRAINING)]
BenchmarkEvery = Annotated[int | None, setting(TrainingOptions, "benchmark_every", "--benchmark-every", panel=INTERIM)]
BenchmarkLimit = Annotated[int | None, setting(TrainingOptions, "benchmark_limit", "--benchmark-limit", panel=INTERIM)]
InterimTasks = Annotated[Any, setting(EvalOptions, "tasks", "--tasks", panel=INTERIM, parser=names)]
InterimTaskData = Annotated[
    list[str] | None, setting(EvalOptions, "task_data", "--task-data", panel=INTERIM, default="the published data")
]
FftRate = Annotated[float | None, setting(FftOptions, "learning_rate", "--lr", panel=TRAINING)]
MaskRate = Annotated[Any, setting(MaskTrainOptions, "learning_rate", "--lr", panel=TRAINING, parser=number_or_word)]
Preset = Annotated[str | None, setting(MaskTrainOptions, "preset", "--preset", panel=MASKING)]
Ratio = Annotated[Any, setting(MaskTrainOptions, "ratio", "--ratio", panel=MASKING, parser=ratios)]
Target = Annotated[str | None, setting(MaskTrainOptions, "target", "--target", panel=MASKING)]


def sets_with(sets: list[str] | None, *, no_controls: bool) -> list[str]:
    """Returns the --set options together with that which --no-controls stands for."""
    return [*(sets or ()), *(["controls=[]"] if no_controls else [])]


def given(context: typer.Context, *sections: str) -> dict[str, Any]:
    """Returns the recipe keys set by options, with their values.

    A command parameter has the name of the field it sets: in the first section with such a field, else in the recipe.

    Args:
        context: The context of the command.
        sections: Names of the recipe's sections that the command has options for.
    """
    keys = {name: name for name in Recipe.model_fields}
    for section in reversed(sections):
        fields = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        keys |= {name: f"{section}.{name}" for name in fields}
    keys["chat_template"] = "chat_template"  # the eval section has a switch of the same name
    values = {name: value for name, value in context.params.items() if name in keys and value not in (None, [], ())}
    if "task_data" in values:
        values["task_data"] = files_by_task(values["task_data"])
    if "template_args" in values:
        values["template_args"] = template_variables(values["template_args"])
    return {keys[name]: value for name, value in values.items()}
