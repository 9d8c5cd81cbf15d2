"""Recipes: what a command or an experiment is to do, strict and with every default in one place.

A recipe is a YAML file. Shared keys (`model`, `data`, `seed`, ...) stand at the top, one section a command below, and
`stages` for a whole experiment. Precedence: option > `--set` > recipe > default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mftctl.data.examples import Learn
from mftctl.data.record_issues import BadRecords
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from mftctl.runtime.compute_settings import Attention, Precision

DEFAULT_RATIO = 0.1
DEFAULT_UPDATE_RATIO = 0.2
DEFAULT_PATIENCE = 5


class _Section(BaseModel):
    """Strict: an unknown key is an error, text is no number, and neither are infinity and nan."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _SourceMapping(_Section):
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


def _layers_text(value: object) -> object:
    """One layer as text, which YAML reads as a number; anything else as it is, for the type check to refuse."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayersText = Annotated[str, BeforeValidator(_layers_text)]
Prompts = Literal["lm-eval", "olmes"]
"""Whose form a benchmark is asked in: that of lm-eval, or that of OLMES, the harness of MFT's paper."""
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"a device is auto, cpu, cuda, cuda:N, mps or xpu, not {name}")
    return name


Device = Annotated[str, AfterValidator(_check_device)]


class TrainingOptions(_Section):
    """How long and how fast, the same words for `fft` and `mask-train`."""

    data_fraction: float = Field(1.0, gt=0, le=1, description="Share of the training data used.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; overrides epochs.")
    batch_size: int = Field(8, gt=0, description="Records a forward pass, on each device.")
    grad_accum_steps: int | None = Field(
        None, gt=0, description="Forward passes an optimizer step, on each device; 1 by default."
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="Records an optimizer step, over all processes, instead of --grad-accum."
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens a forward pass, padding counted, on each device: a step's records go together by length, "
        "as many as fit, whatever the batch size; a longer one goes alone.",
    )
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are cut at the end.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How the learning rate falls to 0.")
    warmup_ratio: Share = Field(0.03, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 does not clip.")
    precision: Precision = Field("auto", description="auto: bf16 on a GPU that has it, else fp32.")
    gradient_checkpointing: bool = Field(False, description="Save memory by computing activations twice.")
    deterministic: bool = Field(
        False, description="The same bits each time on a GPU, also after --resume; slower. On a CPU that always holds."
    )
    val_steps: int | None = Field(None, gt=0, description="Steps between two validations; a tenth of all by default.")
    patience: int | None = Field(None, gt=0, description="Stop after this many validations without a new best.")
    benchmark_every: int | None = Field(
        None, gt=0, description="Measure the benchmarks and the test data each so many steps, at the start and the end."
    )
    benchmark_limit: int = Field(100, gt=0, description="--benchmark-every: only the first so many problems or records of each.")

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if self.global_batch_size is None:
            return self
        if self.grad_accum_steps is not None:
            raise ValueError("give either global_batch_size or grad_accum_steps, not both")
        if self.batch_tokens is None and self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size must be a multiple of batch_size; {self.global_batch_size} is none of "
                f"{self.batch_size} (batch_tokens needs no multiple)"
            )
        return self


class FftOptions(TrainingOptions):
    """Fine-tuning of all weights, or of those that a method chooses."""

    method: Literal["full", "lora", "gmt", "hft", "random"] = Field(
        "full",
        description="full: all weights; gmt: those with the largest gradients at each step; random: random ones at "
        "each step; hft: half of the parameters; lora: a low-rank adapter.",
    )
    ratio: Share | None = Field(
        None,
        description="gmt and random: share of the weights that a step leaves as they are, of random ones drawn anew at "
        "each step; 0.2 by default.",
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="gmt and random: the ratio holds for each tensor, or for all together."
    )
    unselected: Literal["unchanged", "momentum"] = Field(
        "unchanged",
        description="gmt and random: weights not chosen stay as they are, or still move with the optimizer's momentum.",
    )
    exclude: tuple[Literal["embeddings", "head"], ...] = Field(
        (),
        strict=False,
        description="gmt and random: what is updated whole and not chosen from, embeddings or head or both; tied, they "
        "are one tensor, which either word means.",
    )
    lora_rank: int = Field(16, gt=0, description="lora: rank of the adapter.")
    lora_alpha: int = Field(32, gt=0, description="lora: the adapter is scaled by alpha / rank.")
    lora_dropout: Share = Field(0.0, description="lora: dropout before the adapter.")
    merge: bool = Field(False, description="lora: write the merged model instead of the adapter.")
    quantize: Literal["nf4"] | None = Field(
        None, description="lora: hold the base in 4 bits a weight (QLoRA); needs bitsandbytes."
    )
    optimizer: Literal["adamw", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="adamw, sgd, rmsprop, adagrad, adafactor; adamw_8bit and paged_adamw_8bit, with moments in 8 "
        "bits, need bitsandbytes.",
    )
    low_memory: bool = Field(
        False,
        description="Weights, gradients and moments in bf16, rounded by chance: 8 bytes a weight instead of 16.",
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak of the schedule.")
    keep: Literal["best", "last"] = Field("best", description="best: the state with the lowest validation loss.")
    save_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of the weights written; auto: that of the checkpoint started from."
    )

    @model_validator(mode="after")
    def _ratio_has_a_method(self) -> FftOptions:
        if self.ratio is not None and self.method not in ("gmt", "random"):
            raise ValueError(f"fft.ratio is for the methods gmt and random; the method is {self.method}")
        if self.exclude and self.method not in ("gmt", "random"):
            raise ValueError(f"fft.exclude is for the methods gmt and random; the method is {self.method}")
        return self

    @model_validator(mode="after")
    def _memory_is_saved_in_ways_that_go_together(self) -> FftOptions:
        if self.quantize is not None and self.method != "lora":
            raise ValueError(f"fft.quantize is for the method lora; the method is {self.method}")
        if self.low_memory and self.method == "lora":
            raise ValueError("fft.low_memory is for weights that are trained; lora freezes them (fft.quantize: nf4)")
        if self.low_memory and self.optimizer != "adamw":
            raise ValueError(f"fft.low_memory has an optimizer of its own, adamw; the optimizer is {self.optimizer}")
        if self.low_memory and self.precision == "fp32":
            raise ValueError("fft.low_memory computes in bf16; the precision is fp32")
        if self.has_8bit_moments and self.method in ("gmt", "random") and self.unselected == "unchanged":
            raise ValueError(
                f"fft.optimizer: {self.optimizer} keeps one scale for 256 moments, so that those of weights not chosen "
                "cannot stay unchanged (fft.unselected: momentum, or fft.low_memory with adamw)"
            )
        return self

    @property
    def has_8bit_moments(self) -> bool:
        """Whether the optimizer is one of bitsandbytes."""
        return self.optimizer in ("adamw_8bit", "paged_adamw_8bit")

    @property
    def effective_ratio(self) -> float:
        """The share of weights that a step leaves as they are, for the methods that choose."""
        return DEFAULT_UPDATE_RATIO if self.ratio is None else self.ratio


class MaskTrainOptions(TrainingOptions):
    """Choosing which weights of a fine-tuned model to remove."""

    method: Literal["learned", "random", "magnitude", "drop"] = Field(
        "learned",
        description="learned: Mask Fine-Tuning; random and magnitude: baselines without training; drop: go back to "
        "the weights before fine-tuning.",
    )
    unit: Literal["weight", "row"] = Field(
        "weight",
        description="magnitude: what goes is single weights, or whole rows (all weights of an output), by their mean.",
    )
    layers: LayersText | None = Field(
        None, description='Decoder layers, such as "4-7", "0,3,8-11" or "all"; the probe\'s by default.'
    )
    target: Literal["attn", "mlp", "both"] = Field("both", description="Projections that carry a mask.")
    preset: Literal["default", "paper", "reference"] = Field(
        "default",
        description="What is not given. default: scores start at the size of the weight, and what falls below 0 is "
        "removed; paper: scores start random, and the 10 % with the smallest |score| are removed; reference: the "
        "same, with the last mask and the loss of the paper's code.",
    )
    learn_from: Literal["auto", "all", "unseen"] | None = Field(
        None,
        description="Training records. unseen: those that fine-tuning has not seen; auto (the default): these if there "
        "are at least 64, else all; all (paper, reference).",
    )
    ratio: Share | dict[str, Share] | None = Field(
        None,
        description="Share of the weights removed of each tensor, or of the projections named, such as "
        "q_proj=0.05,down_proj=0.1; by default as many as fall below the threshold, and 0.1 for all else.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="Stop after this many validations without a new best; by default 5, for paper and keep last never.",
    )
    threshold: float | None = Field(None, description="Remove scores below this instead of a fixed ratio.")
    ranking: Literal["magnitude", "signed"] | None = Field(
        None, description="What a ratio ranks. signed: the score (the default); magnitude: |score| (paper, reference)."
    )
    start: Literal["magnitude", "normal", "kaiming", "constant"] | None = Field(
        None,
        description="magnitude: the size of the weight (the default); normal: N(0, start_std) (paper, reference); "
        "kaiming: uniform within 1/sqrt(fan_in); constant: all equal.",
    )
    start_std: float | None = Field(
        None,
        gt=0,
        description="normal: standard deviation of the scores; the model's initializer_range by default, or 0.02.",
    )
    start_value: float = Field(0.01, description="constant: the score of all weights.")
    learning_rate: float | Literal["auto"] = Field(
        "auto",
        description="auto: 4 times the rate of fine-tuning; for other starts scaled to the scores, so that steps and "
        "model size change nothing.",
    )
    travel: float = Field(
        1.6,
        gt=0,
        description="normal, kaiming and constant: how far auto lets a score move, in units of the start: its standard "
        "deviation, its range, its distance from the threshold.",
    )
    keep: Literal["best", "last"] | None = Field(
        None,
        description="best: the mask with the lowest validation loss (the default); last: that of the last step "
        "(reference).",
    )
    strategy: Literal["trivial", "salient", "random"] = Field(
        "trivial", description="drop: undo the smallest changes of fine-tuning, the largest, or random ones."
    )
    base: str | None = Field(None, description="drop: the model before fine-tuning; that of the fft run by default.")
    low_memory: bool = Field(
        False,
        description="Scores and moments in bf16, rounded by chance, and no copy of masked weights: 8 bytes a masked "
        "weight instead of 20.",
    )
    prefix_cache_gb: float | None = Field(
        None,
        ge=0,
        description="Gigabytes for the hidden states below the first masked layer, which are computed once for each "
        "batch; 0 computes them anew. By default a quarter of the free memory, then of the free disk.",
    )

    @model_validator(mode="after")
    def _one_indicator(self) -> MaskTrainOptions:
        if self.ratio is not None and self.threshold is not None:
            raise ValueError("give either a ratio or a threshold, not both")
        if self.threshold is not None and self.method != "learned":
            raise ValueError(f"a threshold needs learned scores; the {self.method} mask takes a ratio")
        if self.unit == "row" and self.method != "magnitude":
            raise ValueError(f"mask_train.unit: row is for the method magnitude; the method is {self.method}")
        if isinstance(self.ratio, dict) and self.method == "drop":
            raise ValueError("drop takes one ratio for all tensors")
        if self.ratio == {}:
            raise ValueError("a ratio by projection names at least one")
        return self

    @model_validator(mode="after")
    def _keys_have_their_start(self) -> MaskTrainOptions:
        fields, start = type(self).model_fields, self.effective_start
        for name, starts in (
            ("travel", ("normal", "kaiming", "constant")),
            ("start_std", ("normal",)),
            ("start_value", ("constant",)),
        ):
            if getattr(self, name) != fields[name].default and start not in starts:
                raise ValueError(f"mask_train.{name} is for the start {', '.join(starts)}; the start is {start}")
        return self

    @property
    def follows_paper(self) -> bool:
        """Whether what is not given is as the paper has it."""
        return self.preset != "default"

    @property
    def effective_keep(self) -> Literal["best", "last"]:
        """The mask kept; of a method without training the only one."""
        if self.method != "learned":
            return "best"
        return self.keep or ("last" if self.preset == "reference" else "best")

    @property
    def averages_records(self) -> bool:
        """Whether the loss is the mean over records instead of answer tokens."""
        return self.preset == "reference"

    @property
    def effective_learn_from(self) -> Literal["auto", "all", "unseen"]:
        """The training records in force."""
        return self.learn_from or ("all" if self.follows_paper else "auto")

    @property
    def effective_start(self) -> Literal["magnitude", "normal", "kaiming", "constant"]:
        """The start in force."""
        return self.start or ("normal" if self.follows_paper else "magnitude")

    @property
    def effective_ranking(self) -> Literal["magnitude", "signed"]:
        """The ranking in force."""
        return self.ranking or ("magnitude" if self.follows_paper else "signed")

    @property
    def effective_patience(self) -> int | None:
        """Validations without a new best after which training ends; None for never."""
        runs_on = self.follows_paper or self.effective_keep == "last"
        return self.patience or (None if runs_on else DEFAULT_PATIENCE)

    @property
    def effective_threshold(self) -> float | None:
        """The threshold in force: None where a ratio decides."""
        whole = not self.follows_paper and self.effective_start in ("magnitude", "constant")
        if whole and self.ratio is None and self.method == "learned":
            return self.threshold or 0.0
        return self.threshold

    @property
    def effective_ratio(self) -> float | dict[str, float] | None:
        """The ratio in force, of all masked tensors or by projection: None where a threshold decides."""
        return DEFAULT_RATIO if self.ratio is None and self.effective_threshold is None else self.ratio

    @property
    def projections(self) -> list[str] | None:
        """The projections that a ratio by projection names; None where all of the target carry a mask."""
        return list(self.ratio) if isinstance(self.ratio, dict) else None

    def ratio_of(self, projection: str) -> float | None:
        """The ratio of one projection, such as `q_proj`: None where a threshold decides."""
        ratio = self.effective_ratio
        return ratio[projection] if isinstance(ratio, dict) else ratio


class ProbeOptions(_Section):
    """Which layers gain from a mask; trains with the `mask_train` section."""

    groups: tuple[int | Literal["all"], ...] | None = Field(
        None,
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

    @model_validator(mode="after")
    def _promises_are_of_the_loss(self) -> ProbeOptions:
        if self.fast and self.by != "loss":
            raise ValueError(f"probe.fast promises a loss, without any mask to score by {self.by}")
        return self


class EvalOptions(_Section):
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


class Stage(_Section):
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


class Recipe(_Section):
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

    @property
    def probe_groups(self) -> tuple[int | Literal["all"], ...]:
        """The sizes of the groups that a probe tries.

        The paper never tries all layers beside its groups; promises add up, so that all layers always promise most.
        """
        only = self.mask_train.follows_paper or self.probe.fast
        return self.probe.groups or ((4,) if only else (4, "all"))
