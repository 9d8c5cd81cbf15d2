"""Recipes: the strict settings of a command or an experiment, with all defaults in one place.

A recipe is a YAML file. Shared keys (`model`, `data`, `seed`, ...) come first, then one section per command, and
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
    """Strict base: unknown keys, text for numbers, infinity and nan are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _SourceMapping(_Section):
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


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_to_sources)]


def _layers_text(value: object) -> object:
    """Converts a single layer, which YAML reads as a number, to text; returns anything else unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayersText = Annotated[str, BeforeValidator(_layers_text)]
Prompts = Literal["lm-eval", "olmes"]
"""The form of a benchmark's prompts: lm-eval's, or that of OLMES, the evaluation harness of the MFT paper."""
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"a device is auto, cpu, cuda, cuda:N, mps or xpu, not {name}")
    return name


Device = Annotated[str, AfterValidator(_check_device)]


class TrainingOptions(_Section):
    """Training settings shared by `fft` and `mask-train`."""

    data_fraction: float = Field(1.0, gt=0, le=1, description="Share of the training data to use.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; overrides epochs.")
    batch_size: int = Field(8, gt=0, description="Records per forward pass on each device.")
    grad_accum_steps: int | None = Field(
        None, gt=0, description="Forward passes per optimizer step on each device; 1 by default."
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="Records per optimizer step over all processes, instead of --grad-accum."
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens per forward pass on each device, including padding: groups records of similar length up to "
        "this size, regardless of the batch size; a longer record gets its own pass.",
    )
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are truncated at the end.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="Decay of the learning rate to 0.")
    warmup_ratio: Share = Field(0.03, description="Share of steps for learning rate warmup.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm; 0 disables clipping.")
    precision: Precision = Field("auto", description="auto: bf16 on a GPU that supports it, otherwise fp32.")
    gradient_checkpointing: bool = Field(
        False, description="Save memory by recomputing activations in the backward pass."
    )
    deterministic: bool = Field(
        False, description="Bit-identical results on a GPU, also after --resume; slower. CPU results always are."
    )
    eval_steps: int | None = Field(
        None, gt=0, description="Steps between validations; a tenth of all steps by default."
    )
    patience: int | None = Field(None, gt=0, description="Stop early after this many validations without improvement.")
    eval_every: int | None = Field(
        None, gt=0, description="Measure benchmarks and test data every N steps, at the start and at the end."
    )
    eval_limit: int = Field(100, gt=0, description="--eval-every: use only the first N problems or records of each.")

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if self.global_batch_size is None:
            return self
        if self.grad_accum_steps is not None:
            raise ValueError("give either global_batch_size or grad_accum_steps, not both")
        if self.batch_tokens is None and self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size must be a multiple of batch_size; {self.global_batch_size} is not a "
                f"multiple of {self.batch_size} (not required with batch_tokens)"
            )
        return self


class FftOptions(TrainingOptions):
    """Settings for fine-tuning all weights, or those selected by a method."""

    method: Literal["full", "lora", "gmt", "hft", "random"] = Field(
        "full",
        description="full: all weights; gmt: the weights with the largest gradients at each step; random: random "
        "weights at each step; hft: half of the parameters; lora: a low-rank adapter.",
    )
    ratio: Share | None = Field(
        None,
        description="gmt and random: share of weights not updated in a step, chosen again at each step; 0.2 by "
        "default.",
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="gmt and random: apply the ratio to each tensor, or to all weights together."
    )
    unselected: Literal["unchanged", "momentum"] = Field(
        "unchanged",
        description="gmt and random: keep unselected weights unchanged, or let optimizer momentum move them.",
    )
    exclude: tuple[Literal["embeddings", "head"], ...] = Field(
        (),
        strict=False,
        description="gmt and random: parts always updated in full: embeddings, head or both; if tied, either word "
        "means the shared tensor.",
    )
    lora_rank: int = Field(16, gt=0, description="lora: rank of the adapter.")
    lora_alpha: int = Field(32, gt=0, description="lora: the adapter is scaled by alpha / rank.")
    lora_dropout: Share = Field(0.0, description="lora: dropout before the adapter.")
    merge: bool = Field(False, description="lora: write the merged model instead of the adapter.")
    quantize: Literal["nf4"] | None = Field(
        None, description="lora: load the base model in 4 bits per weight (QLoRA); needs bitsandbytes."
    )
    optimizer: Literal["adamw", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="adamw, sgd, rmsprop, adagrad, adafactor; adamw_8bit and paged_adamw_8bit (8-bit moments) need "
        "bitsandbytes.",
    )
    low_memory: bool = Field(
        False,
        description="Weights, gradients and moments in stochastically rounded bf16: 8 bytes per weight, not 16.",
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    keep: Literal["best", "last"] = Field(
        "best", description="Checkpoint to keep. best: the one with the lowest validation loss."
    )
    save_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of saved weights; auto: that of the initial checkpoint."
    )

    @model_validator(mode="after")
    def _ratio_has_a_method(self) -> FftOptions:
        if self.ratio is not None and self.method not in ("gmt", "random"):
            raise ValueError(f"fft.ratio applies only to the methods gmt and random; the method is {self.method}")
        if self.exclude and self.method not in ("gmt", "random"):
            raise ValueError(f"fft.exclude applies only to the methods gmt and random; the method is {self.method}")
        return self

    @model_validator(mode="after")
    def _memory_is_saved_in_ways_that_go_together(self) -> FftOptions:
        if self.quantize is not None and self.method != "lora":
            raise ValueError(f"fft.quantize applies only to the method lora; the method is {self.method}")
        if self.low_memory and self.method == "lora":
            raise ValueError(
                "fft.low_memory applies only to trained weights; lora freezes them (use fft.quantize: nf4)"
            )
        if self.low_memory and self.optimizer != "adamw":
            raise ValueError(f"fft.low_memory needs the optimizer adamw; the optimizer is {self.optimizer}")
        if self.low_memory and self.precision == "fp32":
            raise ValueError("fft.low_memory needs bf16; the precision is fp32")
        if self.has_8bit_moments and self.method in ("gmt", "random") and self.unselected == "unchanged":
            raise ValueError(
                f"fft.optimizer: {self.optimizer} keeps one scale per 256 moments, so weights that are not selected "
                "cannot stay unchanged (use fft.unselected: momentum, or fft.low_memory with adamw)"
            )
        return self

    @property
    def has_8bit_moments(self) -> bool:
        """True for the optimizers of bitsandbytes."""
        return self.optimizer in ("adamw_8bit", "paged_adamw_8bit")

    @property
    def effective_ratio(self) -> float:
        """The share of weights not updated in a step, for methods that select weights."""
        return DEFAULT_UPDATE_RATIO if self.ratio is None else self.ratio


class MaskTrainOptions(TrainingOptions):
    """Settings for choosing which weights of a fine-tuned model to remove."""

    method: Literal["learned", "random", "magnitude", "drop"] = Field(
        "learned",
        description="learned: Mask Fine-Tuning; random and magnitude: baselines without training; drop: revert "
        "weights to their values before fine-tuning.",
    )
    unit: Literal["weight", "row"] = Field(
        "weight",
        description="magnitude: remove single weights, or whole rows (all weights of one output) by their mean.",
    )
    layers: LayersText | None = Field(
        None, description='Decoder layers, such as "4-7", "0,3,8-11" or "all"; the probe\'s by default.'
    )
    target: Literal["attn", "mlp", "both"] = Field("both", description="Projections to mask.")
    preset: Literal["default", "paper", "reference"] = Field(
        "default",
        description="Defaults for options left unset. default: scores start at the magnitude of the weight, and "
        "weights whose score falls below 0 are removed; paper: scores start at random, and the 10 % with the smallest "
        "|score| are removed; reference: like paper, with the last mask and the loss of the paper's code.",
    )
    learn_from: Literal["auto", "all", "unseen"] | None = Field(
        None,
        description="Training records to use. unseen: those not seen in fine-tuning; auto (the default): unseen if "
        "there are at least 64, otherwise all; all (paper, reference).",
    )
    ratio: Share | dict[str, Share] | None = Field(
        None,
        description="Share of weights to remove from each tensor, or from the named projections, such as "
        "q_proj=0.05,down_proj=0.1; by default set by the threshold, or 0.1 without one.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="Stop early after this many validations without improvement; 5 by default, never for paper or "
        "keep last.",
    )
    threshold: float | None = Field(
        None, description="Remove weights with scores below this value instead of a fixed ratio."
    )
    ranking: Literal["magnitude", "signed"] | None = Field(
        None,
        description="Ranking for a ratio. signed: by score (the default); magnitude: by |score| (paper, reference).",
    )
    start: Literal["magnitude", "normal", "kaiming", "constant"] | None = Field(
        None,
        description="Initial scores. magnitude: |weight| (the default); normal: N(0, start_std) (paper, reference); "
        "kaiming: uniform within 1/sqrt(fan_in); constant: all equal.",
    )
    start_std: float | None = Field(
        None,
        gt=0,
        description="normal: standard deviation of the scores; by default the model's initializer_range, or 0.02.",
    )
    start_value: float = Field(0.01, description="constant: the initial score of all weights.")
    learning_rate: float | Literal["auto"] = Field(
        "auto",
        description="auto: 4 times the rate of fine-tuning; for --start other than magnitude scaled to the scores, "
        "independent of steps and model size.",
    )
    travel: float = Field(
        1.6,
        gt=0,
        description="normal, kaiming and constant: how far a score can move with learning rate auto, in units of the "
        "start: its standard deviation, its range, its distance from the threshold.",
    )
    keep: Literal["best", "last"] | None = Field(
        None,
        description="Mask to keep. best: lowest validation loss (the default); last: the last step (reference).",
    )
    strategy: Literal["trivial", "salient", "random"] = Field(
        "trivial", description="drop: revert the smallest changes made by fine-tuning, the largest, or random ones."
    )
    base: str | None = Field(None, description="drop: the model before fine-tuning; by default that of the fft run.")
    low_memory: bool = Field(
        False,
        description="Scores and moments in stochastically rounded bf16, and no copy of masked weights: 8 bytes per "
        "masked weight instead of 20.",
    )
    prefix_cache_gb: float | None = Field(
        None,
        ge=0,
        description="Gigabytes for caching the hidden states below the first masked layer, computed once per batch; "
        "0 always recomputes them. By default a quarter of the free memory, then of the free disk.",
    )

    @model_validator(mode="after")
    def _one_indicator(self) -> MaskTrainOptions:
        if self.ratio is not None and self.threshold is not None:
            raise ValueError("give either a ratio or a threshold, not both")
        if self.threshold is not None and self.method != "learned":
            raise ValueError(f"a threshold needs learned scores; the method {self.method} takes a ratio")
        if self.unit == "row" and self.method != "magnitude":
            raise ValueError(f"mask_train.unit: row applies only to the method magnitude; the method is {self.method}")
        if isinstance(self.ratio, dict) and self.method == "drop":
            raise ValueError("drop takes one ratio for all tensors")
        if self.ratio == {}:
            raise ValueError("a ratio by projection must name at least one projection")
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
                raise ValueError(f"mask_train.{name} applies only to start {', '.join(starts)}; the start is {start}")
        return self

    @property
    def follows_paper(self) -> bool:
        """True if unset options take the values of the paper."""
        return self.preset != "default"

    @property
    def effective_keep(self) -> Literal["best", "last"]:
        """The mask to keep in force; methods without training have only one."""
        if self.method != "learned":
            return "best"
        return self.keep or ("last" if self.preset == "reference" else "best")

    @property
    def averages_records(self) -> bool:
        """True if the loss is the mean over records instead of answer tokens."""
        return self.preset == "reference"

    @property
    def effective_learn_from(self) -> Literal["auto", "all", "unseen"]:
        """The choice of training records in force."""
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
        """Validations without improvement after which training stops early; None for never."""
        runs_on = self.follows_paper or self.effective_keep == "last"
        return self.patience or (None if runs_on else DEFAULT_PATIENCE)

    @property
    def effective_threshold(self) -> float | None:
        """The threshold in force; None if a ratio applies."""
        whole = not self.follows_paper and self.effective_start in ("magnitude", "constant")
        if whole and self.ratio is None and self.method == "learned":
            return self.threshold or 0.0
        return self.threshold

    @property
    def effective_ratio(self) -> float | dict[str, float] | None:
        """The ratio in force, for all masked tensors or by projection; None if a threshold applies."""
        return DEFAULT_RATIO if self.ratio is None and self.effective_threshold is None else self.ratio

    @property
    def projections(self) -> list[str] | None:
        """The projections named in a ratio by projection; None if all projections of the target are masked."""
        return list(self.ratio) if isinstance(self.ratio, dict) else None

    def ratio_of(self, projection: str) -> float | None:
        """Returns the ratio of one projection, such as `q_proj`; None if a threshold applies."""
        ratio = self.effective_ratio
        return ratio[projection] if isinstance(ratio, dict) else ratio


class ProbeOptions(_Section):
    """Settings for finding the layers that benefit from a mask; training uses the `mask_train` section."""

    groups: tuple[int | Literal["all"], ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description='Consecutive layers per group, or "all"; by default 4 and all, for paper and fast only 4.',
    )
    data_fraction: float = Field(0.1, gt=0, le=1, description="Share of the training data to use.")
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

    @model_validator(mode="after")
    def _promises_are_of_the_loss(self) -> ProbeOptions:
        if self.fast and self.by != "loss":
            raise ValueError(f"probe.fast predicts a loss and makes no mask to score by {self.by}")
        return self


class EvalOptions(_Section):
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
    engine: Literal["hf", "vllm"] = Field(
        "hf", description="Generates the answers: transformers, or vLLM where it is installed."
    )
    tensor_parallel: int = Field(1, gt=0, description="vLLM: number of GPUs to split each layer across.")
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="vLLM: share of GPU memory to use; about 0.9 by default."
    )
    max_model_length_tokens: int | None = Field(
        None, gt=1, description="vLLM: maximum tokens of prompt and answer; by default as the benchmarks need."
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


Command = Literal["fft", "probe", "mask-train", "apply", "eval"]


class Stage(_Section):
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


class Recipe(_Section):
    """All settings of a command or an experiment."""

    name: str | None = Field(None, description="Name of the experiment.")
    description: str | None = Field(None, description="One-line description of the experiment.")
    model: str | None = Field(None, description="Checkpoint folder, hub id, or quickstart for the built-in model.")
    model_type: str | None = Field(None, description="Model family the recipe is for, as in config.json.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    data: Sources = Field((), description="Training data: files or hub ids; FILE=COUNT for part of a file.")
    val_data: Sources = Field((), description="Validation data; by default split off from the training data.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Share of training data to split off for validation."
    )
    test_data: Sources = Field((), description="Data for eval to measure on.")
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
    bad_records: BadRecords = Field("error", description="How to handle unusable records.")
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
    fft: FftOptions = FftOptions()
    probe: ProbeOptions = ProbeOptions()
    mask_train: MaskTrainOptions = MaskTrainOptions()
    eval: EvalOptions = EvalOptions()
    stages: dict[str, Stage] = Field(default_factory=dict)

    @property
    def probe_groups(self) -> tuple[int | Literal["all"], ...]:
        """The group sizes that a probe tries.

        The paper never masks all layers as one group. Fast predictions add up, so all layers would always win.
        """
        only = self.mask_train.follows_paper or self.probe.fast
        return self.probe.groups or ((4,) if only else (4, "all"))
