"""Recipes: what a command or an experiment is to do, strict and with every default in one place.

A recipe is a YAML file. Shared keys (`model`, `data`, `seed`, ...) stand at the top, one section a command below, and
`stages` for a whole experiment. Precedence: option > `--set` > recipe > default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mftctl.data.examples import Learn
from mftctl.data.record_issues import BadRecords
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from mftctl.experiments.presets import DEFAULT_GROUPS, GroupSize, probe_in_force, without_nulls
from mftctl.experiments.training_options import FftOptions, LayersText, MaskTrainOptions, Section
from mftctl.runtime.compute_settings import Attention


class _SourceMapping(Section):
    """A `DataSource` written as a mapping."""

    path: str = Field(min_length=1)
    count: int | None = Field(None, gt=0)
    split: str | None = None


def _to_sources(value: object) -> object:
    """`train.jsonl=1000`, a mapping, or a list of either, as a tuple of `DataSource`."""
    parts = value if isinstance(value, list | tuple) else [value]
    return tuple(_to_source(part) for part in parts)


def _to_source(part: object) -> object:
    """The source of a text or a mapping; anything else as it is, for the type check to refuse."""
    try:
        if isinstance(part, str):
            return DataSource.parse(part)
        if isinstance(part, dict):
            return DataSource(**_SourceMapping.model_validate(part).model_dump())
    except DataError as error:
        raise ValueError(f"{error.message} Expected {error.expected}, got {error.actual}") from error
    except ValidationError as error:
        details = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        known = ", ".join(_SourceMapping.model_fields)
        raise ValueError(f"{part} is no data source ({'; '.join(details)}); the keys are {known}") from error
    return part


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_to_sources)]


Prompts = Literal["lm-eval", "olmes"]
"""Whose form a benchmark is asked in: that of lm-eval, or that of OLMES, the harness of MFT's paper."""


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"a device is auto, cpu, cuda, cuda:N, mps or xpu, not {name}")
    return name


Device = Annotated[str, AfterValidator(_check_device)]


class ProbeOptions(Section):
    """Which layers gain from a mask; trains with the `mask_train` section."""

    groups: tuple[GroupSize, ...] = Field(
        DEFAULT_GROUPS,
        min_length=1,
        strict=False,
        description='Consecutive layers a group, or "all"; by default 4 and all, for paper and fast 4.',
    )
    data_fraction: float = Field(0.1, gt=0, le=1, description="Share of the training data used.")
    layers: LayersText | None = Field(None, description="Probe only these decoder layers; all by default.")
    epochs: float | None = Field(None, gt=0, description="Passes over that share; mask_train's by default.")
    by: str = Field(
        "loss",
        min_length=1,
        description="What ranks the groups: loss on validation records, exact_match of answers to them, or the score "
        "of a benchmark.",
    )
    fast: bool = Field(
        False,
        description="Train nothing: one pass of gradients tells, to first order, what a mask of each group promises.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("probe", document)

    @model_validator(mode="after")
    def _promises_are_of_the_loss(self) -> ProbeOptions:
        if self.fast and self.by != "loss":
            raise ValueError(f"probe.fast promises a loss, without any mask to score by {self.by}")
        return self


class EvalOptions(Section):
    """What is measured, and on what."""

    tasks: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Benchmarks: gsm8k, math, humaneval, humaneval_plus, mbpp, mbpp_plus (these four "
        "also with _instruct), ifeval, alpaca_eval, mmlu, bbh, tydiqa, truthfulqa_mc2, the groups coding, instruction, "
        "general and group:math, or any task of lm-eval.",
    )
    task_data: dict[str, str] = Field(
        default_factory=dict, description="Local file or folder of a benchmark, NAME=PATH; repeatable."
    )
    prompts: Prompts = Field(
        "lm-eval",
        description="Whose prompts and metrics: lm-eval's, or those of OLMES, the harness of MFT's paper, for its six "
        "benchmarks.",
    )
    predictions: str | None = Field(None, description="Score the outputs in this file, without a model.")
    limit: int | None = Field(None, gt=0, description="Only the first so many problems or records.")
    engine: Literal["hf", "vllm"] = Field(
        "hf", description="What answers benchmarks: transformers, or vLLM where it is installed."
    )
    tensor_parallel: int = Field(1, gt=0, description="vLLM: GPUs that share out each layer.")
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="vLLM: share of a GPU's memory that it takes; 0.9 or so by default."
    )
    max_model_length_tokens: int | None = Field(
        None, gt=1, description="vLLM: most tokens of a prompt with its answer; by default what the benchmarks need."
    )
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Benchmark prompts a forward pass; auto: as many as the free memory takes."
    )
    max_new_tokens: int | None = Field(None, gt=0, description="Most tokens of an answer; the benchmark's by default.")
    chat_template: bool = Field(False, description="Put benchmark prompts through the tokenizer's chat template.")
    samples: int = Field(1, gt=0, description="Answers a problem of a code benchmark; 10 give pass@10 as well.")
    temperature: float = Field(0.0, ge=0, description="Of sampling; 0 is greedy.")
    save_samples: bool = Field(False, description="Keep the prompts beside outputs and scores.")
    unsafe_code: bool = Field(False, description="Run model-written code even where there is no sandbox.")
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are cut at the end.")
    generate: bool = Field(True, description="Generate answers for exact match, besides the loss.")

    @model_validator(mode="after")
    def _olmes_asks_without_a_template(self) -> EvalOptions:
        if self.prompts == "olmes" and not self.tasks:
            raise ValueError("eval.prompts: olmes is for benchmarks; name some in eval.tasks")
        if self.prompts == "olmes" and self.chat_template:
            raise ValueError(
                "eval.prompts: the paper's evaluation in OLMES goes through no chat template; leave eval.chat_template "
                "out, or take the prompts of lm-eval"
            )
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> EvalOptions:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"eval.samples: {self.samples} greedy answers are all alike; give a temperature, such as 0.8"
            )
        return self


Command = Literal["fft", "probe", "mask-train", "apply", "eval"]


class Stage(Section):
    """One step of an experiment."""

    command: Command = Field(description="What the stage does.")
    after: str | None = Field(None, description="The stage whose model is the input; the recipe's model by default.")
    layers_from: str | None = Field(None, description="The probe stage that chooses the layers.")
    of: tuple[str, ...] = Field((), strict=False, description="eval: the stages whose models are evaluated.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted recipe keys changed for this stage.")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="Dotted recipe keys with the values to try: one stage for each combination."
    )

    def needs(self) -> list[str]:
        """Names of the stages that this one builds on."""
        return [name for name in (self.after, self.layers_from, *self.of) if name is not None]


class Recipe(Section):
    """Everything a command or an experiment needs to know."""

    name: str | None = Field(None, description="Name of the experiment.")
    description: str | None = Field(None, description="One line about the experiment.")
    model: str | None = Field(None, description="Checkpoint folder, hub id, or quickstart for the built-in model.")
    model_type: str | None = Field(None, description="The model family the recipe is for, as in config.json.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    data: Sources = Field((), description="Training data: files or hub ids, FILE=COUNT for a part.")
    val_data: Sources = Field((), description="Validation data; split off the training data by default.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Share split off for validation.")
    test_data: Sources = Field((), description="Data that eval measures on.")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Jinja file, one of the tokenizer's named templates, or chatml, tulu, llama3, zephyr or alpaca; "
        "written into the model.",
    )
    template_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="Variable of the chat template, such as enable_thinking=false; repeatable.",
    )
    merge_system: bool = Field(False, description="Put the system prompt into the first question.")
    learn: Learn = Field("all", description="Answers learned of a conversation: all, or the last.")
    bad_records: BadRecords = Field("error", description="What to do with records that cannot be used.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Decides order, splits and random starts.")
    seeds: tuple[int, ...] = Field((), strict=False, description="run: repeat the experiment for each.")
    device: Device = Field(
        "auto", description="cpu, cuda, cuda:N (a GPU by its number), mps or xpu; auto: the GPU if there is one."
    )
    attention: Attention = Field(
        "auto", description="Kernels of attention: sdpa, flash_attention_2 or eager; auto: what transformers chooses."
    )
    check_memory: bool = Field(
        True, description="On a GPU: stop before weights are loaded where the estimate finds no room for the training."
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that a model brings itself.")
    fft: FftOptions = FftOptions()
    probe: ProbeOptions = ProbeOptions()
    mask_train: MaskTrainOptions = MaskTrainOptions()
    eval: EvalOptions = EvalOptions()
    stages: dict[str, Stage] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _settle_the_probe(self) -> Recipe:
        """Fills in what was left unset of the probe, which stays known as not given."""
        self.__dict__["probe"] = probe = self.probe.model_copy()
        probe.__dict__.update(probe_in_force(probe.given(), self.mask_train.preset, is_fast=probe.fast))
        return self
