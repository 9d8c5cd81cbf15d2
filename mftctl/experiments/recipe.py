"""Recipes: the strict settings of a command or an experiment, with all defaults in one place.

A recipe is a YAML file. Shared keys (`model`, `data`, `seed`, ...) come first, then one section per command, and
`stages` for a whole experiment. Precedence: option > `--set` > recipe > default.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mftctl.data.examples import Learn
from mftctl.data.record_issues import BadRecords
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from mftctl.experiments.delta_options import DeltaOptions
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import LayersText, MaskTrainOptions
from mftctl.experiments.presets import DEFAULT_GROUPS, GroupSize, probe_in_force, without_nulls
from mftctl.experiments.section import Section
from mftctl.experiments.tracking.names import TrackerName
from mftctl.runtime.compute_settings import Attention


class _SourceMapping(Section):
    """A `DataSource` written as a mapping."""

    path: str = Field(min_length=1)
    count: int | None = Field(None, gt=0)
    split: str | None = None


def _to_sources(value: object) -> object:
    """Converts `train.jsonl=1000`, a mapping, or a list of either to a tuple of `DataSource`."""
    parts = value if isinstance(value, list | tuple) else [value]
    return tuple(_to_source(part) for part in parts)


def _to_source(part: object) -> object:
    """Converts a text or a mapping to a source; returns anything else unchanged for the type check to refuse."""
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
        raise ValueError(f"{part} is not a data source ({'; '.join(details)}); known keys: {known}") from error
    return part


def _to_share(value: object) -> object:
    """A share given as text, such as `1%` or `0.01`, as a number.

    Raises:
        ValueError: The text is not a share from 0 to 1.
    """
    if not isinstance(value, str):
        return value
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"a share is a percentage such as 1%, or a number from 0 to 1, not {value!r}")
    return share


BadShare = Annotated[float, Field(ge=0, le=1), BeforeValidator(_to_share)]
Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_to_sources)]


ProbeUnit = Literal["layer", "projection", "head", "neuron"]


Prompts = Literal["lm-eval", "olmes"]
"""The form of a benchmark's prompts: lm-eval's, or that of OLMES, the evaluation harness of the MFT paper."""


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"a device is auto, cpu, cuda, cuda:N, mps or xpu, not {name}")
    return name


Device = Annotated[str, AfterValidator(_check_device)]


def _check_base_url(url: str) -> str:
    """The URL without a slash at its end; a refused one is not repeated, since it may contain a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError("the URL of a server starts with http:// or https://, such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "the URL is recorded, so it may contain no user, password, query or fragment; give an API key in the "
            "environment variable OPENAI_API_KEY"
        )
    if parts.path.rstrip("/").endswith(("/completions", "/models")):
        raise ValueError("give the URL that /completions is added to, such as http://localhost:8000/v1")
    return url.rstrip("/")


BaseUrl = Annotated[str, AfterValidator(_check_base_url)]


class ProbeOptions(Section):
    """Settings for finding the layers that benefit from a mask; training uses the `mask_train` section."""

    groups: tuple[GroupSize, ...] = Field(
        DEFAULT_GROUPS,
        min_length=1,
        strict=False,
        description='Consecutive layers per group, or "all"; by default 4 and all, for paper and fast only 4.',
    )
    data_fraction: float = Field(0.1, gt=0, le=1, description="Share of the training data to use.")
    unit: ProbeUnit = Field(
        "layer",
        description="What to compare. layer: groups of layers; projection: kinds of projections, such as q_proj; with "
        "fast also head (attention heads) and neuron (MLP neurons).",
    )
    layers: LayersText | None = Field(None, description="Probe only these decoder layers; all by default.")
    epochs: float | None = Field(None, gt=0, description="Passes over that share; by default as in mask_train.")
    by: str = Field(
        "loss",
        min_length=1,
        description="Criterion for ranking groups: loss on validation records, exact_match of their answers, or the "
        "score of a benchmark.",
    )
    fast: bool = Field(
        False,
        description="Train nothing: predict the effect of masking each group to first order, from one gradient pass.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("probe", document)

    @model_validator(mode="after")
    def _unit_has_its_options(self) -> ProbeOptions:
        if self.unit in ("head", "neuron") and not self.fast:
            raise ValueError(
                f"probe.unit: {self.unit} needs probe.fast, since a model has too many of them to train a mask for each"
            )
        if self.unit != "layer" and "groups" in self.model_fields_set:
            raise ValueError(f"probe.groups applies only to unit layer; the unit is {self.unit}")
        return self

    @model_validator(mode="after")
    def _promises_are_of_the_loss(self) -> ProbeOptions:
        if self.fast and self.by != "loss":
            raise ValueError(f"probe.fast only predicts the loss, so it cannot rank groups by {self.by}")
        return self


class EvalOptions(Section):
    """Settings for what to measure, and on which data."""

    tasks: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Benchmarks: gsm8k, math, humaneval, humaneval_plus, mbpp, mbpp_plus (the last four "
        "also with _instruct), ifeval, alpaca_eval, mmlu, bbh, tydiqa, truthfulqa_mc2, the groups coding, instruction, "
        "general and group:math, or any task of lm-eval.",
    )
    task_data: dict[str, str] = Field(
        default_factory=dict, description="Local file or folder of a benchmark, NAME=PATH; repeatable."
    )
    prompts: Prompts = Field(
        "lm-eval",
        description="Prompts and metrics: those of lm-eval, or of OLMES, the harness used in the MFT paper, for its "
        "six benchmarks.",
    )
    predictions: str | None = Field(None, description="Score the outputs in this file, without a model.")
    limit: int | None = Field(None, gt=0, description="Use only the first N problems or records.")
    engine: Literal["hf", "vllm", "openai"] = Field(
        "hf",
        description="Engine that generates the answers: transformers (hf), vLLM if it is installed, or a server with "
        "OpenAI's API (openai).",
    )
    base_url: BaseUrl | None = Field(
        None,
        description="Server: its URL, such as http://localhost:8000/v1. An API key is taken from OPENAI_API_KEY.",
    )
    served_model: str | None = Field(
        None, min_length=1, description="Server: name of the model there; by default the only one that it lists."
    )
    concurrent_requests: int = Field(8, gt=0, description="Server: number of requests to send at a time.")
    tensor_parallel: int = Field(1, gt=0, description="vLLM: number of GPUs to split each layer across.")
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="vLLM: share of GPU memory to use; about 0.9 by default."
    )
    max_model_length_tokens: int | None = Field(
        None, gt=1, description="vLLM: maximum tokens of prompt and answer; by default as many as the benchmarks need."
    )
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Benchmark prompts per forward pass; auto: as many as fit in free memory."
    )
    max_new_tokens: int | None = Field(
        None, gt=0, description="Maximum tokens per answer; set by the benchmark by default."
    )
    chat_template: bool = Field(False, description="Apply the tokenizer's chat template to benchmark prompts.")
    samples: int = Field(1, gt=0, description="Answers per problem of a code benchmark; 10 also gives pass@10.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    save_samples: bool = Field(False, description="Save prompts along with outputs and scores.")
    unsafe_code: bool = Field(False, description="Run model-written code even without a sandbox.")
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are truncated at the end.")
    generate: bool = Field(True, description="Also generate answers, for exact match.")

    @model_validator(mode="after")
    def _olmes_asks_without_a_template(self) -> EvalOptions:
        if self.prompts == "olmes" and not self.tasks:
            raise ValueError("eval.prompts: olmes applies only to benchmarks; name some in eval.tasks")
        if self.prompts == "olmes" and self.chat_template:
            raise ValueError(
                "eval.prompts: the paper's OLMES evaluation uses no chat template; leave eval.chat_template out, or "
                "use the prompts of lm-eval"
            )
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> EvalOptions:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"eval.samples: {self.samples} greedy answers would be identical; give a temperature, such as 0.8"
            )
        return self


class InterpolateOptions(Section):
    """Settings for how far to go from the model before fine-tuning to the fine-tuned one."""

    shares: tuple[float, ...] = Field(
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
        min_length=1,
        strict=False,
        description="Shares of the change made by fine-tuning to try: 0 is the model before it, 1 the fine-tuned one, "
        "more goes beyond.",
    )
    base: str | None = Field(None, description="The model before fine-tuning; by default that of the fft run.")

    @model_validator(mode="after")
    def _shares_differ(self) -> InterpolateOptions:
        if len(set(self.shares)) < len(self.shares):
            raise ValueError(f"interpolate.shares must differ, but {list(self.shares)} has one twice")
        return self


Command = Literal["fft", "probe", "mask-train", "apply", "interpolate", "delta", "eval"]
Control = Literal["annealed", "averaged", "interpolated"]


class Stage(Section):
    """One stage of an experiment."""

    command: Command = Field(description="The command that the stage runs.")
    after: str | None = Field(None, description="Stage to take the model from; by default the recipe's model.")
    layers_from: str | None = Field(None, description="Probe stage that selects the layers.")
    of: tuple[str, ...] = Field((), strict=False, description="eval: stages with models to evaluate.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted recipe keys to change for this stage.")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="Dotted recipe keys with values to try: one stage per combination."
    )

    def needs(self) -> list[str]:
        """Returns the names of the stages that this one builds on."""
        return [name for name in (self.after, self.layers_from, *self.of) if name is not None]


class Recipe(Section):
    """All settings of a command or an experiment."""

    name: str | None = Field(None, description="Name of the experiment.")
    description: str | None = Field(None, description="One-line description of the experiment.")
    model: str | None = Field(None, description="Checkpoint folder, hub id, or quickstart for the built-in model.")
    model_type: str | None = Field(None, description="Model family the recipe is for, as in config.json.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    data: Sources = Field(
        (),
        description="Training data: files, folders, patterns such as part-*.jsonl, or hub ids; FILE=COUNT for a part.",
    )
    val_data: Sources = Field((), description="Validation data; by default split off from the training data.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Share of training data to split off for validation."
    )
    test_data: Sources = Field((), description="Test data, which eval measures on.")
    retain_data: Sources = Field(
        (),
        description="Data of another domain, to measure forgetting. About half of its records, chosen by their "
        "prompts, are held out and measured; --retain-weight trains on the others.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Jinja file, a named template of the tokenizer, or chatml, tulu, llama3, zephyr or alpaca; saved "
        "with the model.",
    )
    template_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="Variable of the chat template, such as enable_thinking=false; repeatable.",
    )
    merge_system: bool = Field(False, description="Merge the system prompt into the first question.")
    learn: Learn = Field("all", description="Answers of a conversation to train on: all, or only the last.")
    bad_records: BadRecords = Field("error", description="How to handle malformed records.")
    bad_records_max: BadShare = Field(
        0.01,
        description="Maximum share of records to leave out as malformed, or as longer than --max-length before the "
        "answer; more are an error.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Random seed for order, splits and initial values.")
    seeds: tuple[int, ...] = Field((), strict=False, description="run: repeat the experiment for each seed.")
    device: Device = Field(
        "auto", description="cpu, cuda, cuda:N (a GPU by number), mps or xpu; auto: the GPU if there is one."
    )
    attention: Attention = Field(
        "auto", description="Attention kernels: sdpa, flash_attention_2 or eager; auto: chosen by transformers."
    )
    check_memory: bool = Field(
        True, description="On a GPU: stop before loading weights if the estimate exceeds the free memory."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a model.")
    track: tuple[TrackerName, ...] = Field(
        (),
        strict=False,
        description="Also send metrics to wandb, tensorboard, trackio or mlflow; repeatable. none: to none of them.",
    )
    fft: FftOptions = FftOptions()
    delta: DeltaOptions = DeltaOptions()
    probe: ProbeOptions = ProbeOptions()
    mask_train: MaskTrainOptions = MaskTrainOptions()
    interpolate: InterpolateOptions = InterpolateOptions()
    eval: EvalOptions = EvalOptions()
    stages: dict[str, Stage] = Field(default_factory=dict)
    controls: tuple[Control, ...] = Field(
        ("annealed", "averaged", "interpolated"),
        strict=False,
        description="run: what to compare every learned mask with, from the same model. annealed: as many steps of "
        "plain training; averaged: the same with running averages of the weights; interpolated: the way from the model "
        "before fine-tuning, to the best point.",
    )

    @model_validator(mode="after")
    def _controls_differ(self) -> Recipe:
        if len(set(self.controls)) < len(self.controls):
            raise ValueError(f"controls must differ, but {', '.join(self.controls)} has one twice")
        return self

    @model_validator(mode="after")
    def _trackers_differ(self) -> Recipe:
        if len(set(self.track)) < len(self.track):
            raise ValueError(f"track must differ, but {', '.join(self.track)} has one twice")
        if "none" in self.track and len(self.track) > 1:
            raise ValueError(f"track is none or the names of trackers, not {', '.join(self.track)}")
        return self

    @model_validator(mode="after")
    def _weight_has_data(self) -> Recipe:
        for name, section in (("fft", self.fft), ("mask_train", self.mask_train)):
            if section.retain_weight > 0 and not self.retain_data:
                raise ValueError(f"{name}.retain_weight needs retain_data (--retain DATA)")
        return self

    @model_validator(mode="after")
    def _settle_the_probe(self) -> Recipe:
        """Fills in the probe options left unset, without marking them as given."""
        self.__dict__["probe"] = probe = self.probe.model_copy()
        probe.__dict__.update(probe_in_force(probe.given(), self.mask_train.preset, is_fast=probe.fast))
        return self
