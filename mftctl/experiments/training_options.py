"""How long, how fast and by which method `fft` and `mask-train` train: two sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mftctl.experiments.presets import (
    PRESETS,
    Keep,
    LearnFrom,
    PresetName,
    Ranking,
    ScoreStart,
    fft_in_force,
    mask_train_in_force,
    without_nulls,
)
from mftctl.runtime.compute_settings import Precision


class Section(BaseModel):
    """Strict: an unknown key is an error, text is no number, and neither are infinity and nan."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """The keys that were set, and not filled in, with their values."""
        return {key: getattr(self, key) for key in self.model_fields_set}


def _layers_text(value: object) -> object:
    """One layer as text, which YAML reads as a number; anything else as it is, for the type check to refuse."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayersText = Annotated[str, BeforeValidator(_layers_text)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingOptions(Section):
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
    benchmark_limit: int = Field(
        100, gt=0, description="--benchmark-every: only the first so many problems or records of each."
    )

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

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("fft", document)

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

    @model_validator(mode="after")
    def _settle(self) -> FftOptions:
        """Fills in what was left unset, which stays known as not given."""
        self.__dict__.update(fft_in_force(self.given(), self.method))
        return self

    @property
    def has_8bit_moments(self) -> bool:
        """Whether the optimizer is one of bitsandbytes."""
        return self.optimizer in ("adamw_8bit", "paged_adamw_8bit")


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
    preset: PresetName = Field(
        "default",
        description="What is not given. default: scores start at the size of the weight, and what falls below 0 is "
        "removed; paper: scores start random, and the 10 % with the smallest |score| are removed; reference: the "
        "same, with the last mask and the loss of the paper's code.",
    )
    learn_from: LearnFrom = Field(
        "auto",
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
    ranking: Ranking = Field(
        "signed",
        description="What a ratio ranks. signed: the score (the default); absolute: |score| (paper, reference).",
    )
    start: ScoreStart = Field(
        "weights",
        description="weights: the size of the weight (the default); normal: N(0, start_std) (paper, reference); "
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
    keep: Keep = Field(
        "best",
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

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("mask_train", document)

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
    def _settle(self) -> MaskTrainOptions:
        """Fills in what was left unset, which stays known as not given."""
        self.__dict__.update(mask_train_in_force(self.given(), self.preset, self.method))
        return self

    @model_validator(mode="after")
    def _keys_have_their_start(self) -> MaskTrainOptions:
        fields, start = type(self).model_fields, self.start
        for name, starts in (
            ("travel", ("normal", "kaiming", "constant")),
            ("start_std", ("normal",)),
            ("start_value", ("constant",)),
        ):
            if getattr(self, name) != fields[name].default and start not in starts:
                raise ValueError(f"mask_train.{name} is for the start {', '.join(starts)}; the start is {start}")
        return self

    @property
    def keeps_last(self) -> bool:
        """Whether the mask kept is that of the last step; a method without training has only one."""
        return self.method == "learned" and self.keep == "last"

    @property
    def averages_records(self) -> bool:
        """Whether the loss is the mean over records instead of answer tokens."""
        return PRESETS[self.preset].averages_records

    @property
    def projections(self) -> list[str] | None:
        """The projections that a ratio by projection names; None where all of the target carry a mask."""
        return list(self.ratio) if isinstance(self.ratio, dict) else None

    def ratio_of(self, projection: str) -> float | None:
        """The ratio of one projection, such as `q_proj`: None where a threshold decides."""
        return self.ratio[projection] if isinstance(self.ratio, dict) else self.ratio
