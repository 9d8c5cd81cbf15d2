"""The recipe section `mask_train`: methods and settings of choosing weights to remove."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from mftctl.experiments.mask_train_checks import soft_mask_problem
from mftctl.experiments.presets import (
    DEFAULT_TRAVEL,
    PRESETS,
    Keep,
    LearnFrom,
    MaskKind,
    MaxMultiplier,
    PresetName,
    Ranking,
    ScoreStart,
    mask_train_in_force,
    soft_mask_in_force,
    without_nulls,
)
from mftctl.experiments.training_options import Share, TrainingOptions
from mftctl.masking.pattern import Pattern


def _layers_text(value: object) -> object:
    """Converts a single layer, which YAML reads as a number, to text; leaves anything else to the type check."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayersText = Annotated[str, BeforeValidator(_layers_text)]
AUTO: Final = "auto"
DEFAULT_BUDGET: Final = 0.1


class MaskTrainOptions(TrainingOptions):
    """Settings for choosing which weights of a fine-tuned model to remove."""

    method: Literal["learned", "random", "magnitude", "drop"] = Field(
        "learned",
        description="learned: Mask Fine-Tuning; random and magnitude: baselines without training; drop: revert "
        "weights to their values before fine-tuning.",
    )
    kind: MaskKind = Field(
        "weight",
        description="What becomes of removed weights. weight: 0; delta: their value before fine-tuning, so that the "
        "change made by fine-tuning is removed, as always with drop.",
    )
    mask: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: a weight is kept or removed; soft: each weight gets a multiplier of 8 bits, learned from 1.",
    )
    max_multiplier: MaxMultiplier = Field(1, description="soft: the largest multiplier, 1 or 2.")
    harden: bool = Field(
        False,
        description="soft: multipliers approach 0 and 1 in the second half of the training, and a hard mask is kept.",
    )
    unit: Literal["weight", "row"] = Field(
        "weight",
        description="magnitude: remove single weights, or whole rows (all weights of one output) by their mean.",
    )
    layers: LayersText | None = Field(
        None, description='Decoder layers, such as "4-7", "0,3,8-11" or "all"; the probe\'s by default.'
    )
    target: Literal["attn", "mlp", "both", "projector", "all"] = Field(
        "both",
        description="Projections to mask. attn, mlp or both of the decoder layers; projector: those between the vision "
        "tower and the language model; all: both and projector.",
    )
    preset: PresetName = Field(
        "default",
        description="Defaults for options left unset. default: scores start at the magnitude of the weight, and "
        "weights whose score falls below 0 are removed; paper: scores start at random, and the 10 % with the smallest "
        "|score| are removed; reference: like paper, with the last mask and the loss of the paper's code.",
    )
    learn_from: LearnFrom = Field(
        "auto",
        description="Training records to use. unseen: those not seen in fine-tuning; auto (the default): unseen if "
        "there are at least 64, otherwise all; all (paper, reference).",
    )
    projections: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="Mask only these kinds of projections, such as q_proj,down_proj; the probe's by default, or all "
        "of the target.",
    )
    ratio: Share | dict[str, Share] | Literal["auto"] | None = Field(
        None,
        description="Share of weights to remove from each tensor, or from the named projections, such as "
        "q_proj=0.05,down_proj=0.1; auto: distribute --budget over the tensors by a first-order estimate. By default "
        "set by the threshold, or 0.1 without one.",
    )
    budget: float | None = Field(
        None, gt=0, le=0.5, description="ratio auto: share of all masked weights to remove; 0.1 by default."
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
    pattern: str | None = Field(
        None,
        description="Keep the best N of every M consecutive inputs, such as 2:4, instead of a ratio or threshold.",
    )
    ranking: Ranking = Field(
        "signed",
        description="Ranking for a ratio or pattern. signed: by score (the default); absolute: by |score| (paper, "
        "reference).",
    )
    start: ScoreStart = Field(
        "weights",
        description="Initial scores. weights: |weight|, or |change| with --kind delta (the default); normal: "
        "N(0, start_std) (paper, reference); kaiming: uniform within 1/sqrt(fan_in); constant: all equal; "
        "identity: the multiplier 1 (always with --mask soft).",
    )
    start_std: float | None = Field(
        None,
        gt=0,
        description="normal: standard deviation of the scores; by default the model's initializer_range, or 0.02.",
    )
    start_value: float = Field(0.01, description="constant: the initial score of all weights.")
    learning_rate: float | Literal["auto"] = Field(
        "auto",
        description="auto: 4 times the rate of fine-tuning; for --start other than weights, scaled to the scores and "
        "independent of steps and model size.",
    )
    travel: float = Field(
        DEFAULT_TRAVEL,
        gt=0,
        description="start other than weights: how far a score can move with learning rate auto, in units of the "
        "initial scores' standard deviation, range or distance from the threshold, or of the multiplier 1; 1.6 by "
        "default, 0.05 for soft masks.",
    )
    keep: Keep = Field(
        "best",
        description="Mask to keep. best: lowest validation loss (the default); last: the last step (reference).",
    )
    strategy: Literal["trivial", "salient", "random"] = Field(
        "trivial", description="drop: revert the smallest changes made by fine-tuning, the largest, or random ones."
    )
    rescale: bool = Field(
        False,
        description="drop with strategy random: multiply the other changes by 1 / (1 - ratio), as DARE does.",
    )
    base: str | None = Field(
        None, description="drop and --kind delta: the model before fine-tuning; by default that of the fft run."
    )
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

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("mask_train", document)

    @model_validator(mode="after")
    def _ratio_or_threshold(self) -> MaskTrainOptions:
        if [self.ratio, self.threshold, self.pattern].count(None) < 2:
            raise ValueError("give either a ratio, a threshold or a pattern")
        if self.threshold is not None and self.method != "learned":
            raise ValueError(f"a threshold needs learned scores; the method {self.method} takes a ratio")
        if self.unit == "row" and self.method != "magnitude":
            raise ValueError(f"mask_train.unit: row applies only to the method magnitude; the method is {self.method}")
        given = {
            "average": self.average != "none",
            "best_by": self.best_by != "loss",
            "retain_weight": self.retain_weight,
            "objective": self.objective != "sft",
        }
        if self.method != "learned" and any(given.values()):
            key = next(name for name, is_given in given.items() if is_given)
            raise ValueError(f"mask_train.{key} applies only to learned masks; the method is {self.method}")
        if self.kind == "delta" and self.unit == "row":
            raise ValueError("mask_train.unit: row ranks rows by their weights; it applies only to kind weight")
        if isinstance(self.ratio, dict) and self.method == "drop":
            raise ValueError("drop takes one ratio for all tensors")
        if self.rescale and (self.method, self.strategy) != ("drop", "random"):
            raise ValueError("mask_train.rescale applies only to the method drop with strategy random")
        if self.ratio == {}:
            raise ValueError("a ratio by projection must name at least one projection")
        return self

    @model_validator(mode="after")
    def _budget_is_distributed(self) -> MaskTrainOptions:
        if self.ratio != AUTO:
            if self.budget is not None:
                raise ValueError("mask_train.budget applies only to ratio auto")
            return self
        if self.method not in ("learned", "magnitude"):
            raise ValueError(
                f"mask_train.ratio: auto applies only to the methods learned and magnitude; the method is {self.method}"
            )
        if self.kind == "delta":
            raise ValueError("mask_train.ratio: auto estimates the effect of zeros; it applies only to kind weight")
        if self.unit == "row":
            raise ValueError("mask_train.ratio: auto counts single weights; it does not apply to unit: row")
        if self.objective == "dpo":
            raise ValueError("mask_train.ratio: auto estimates the loss of answers; it does not apply to objective dpo")
        return self

    @model_validator(mode="after")
    def _projections_are_named_once(self) -> MaskTrainOptions:
        if self.projections is None:
            return self
        if isinstance(self.ratio, dict):
            raise ValueError("give either mask_train.projections or a ratio by projection, which names them")
        if self.method == "drop":
            raise ValueError("mask_train.projections does not apply to the method drop, which compares whole models")
        return self

    @model_validator(mode="after")
    def _pattern_is_of_zeros(self) -> MaskTrainOptions:
        if self.pattern is None:
            return self
        Pattern.parse(self.pattern)
        if self.method == "drop" or self.kind == "delta":
            raise ValueError("mask_train.pattern applies only to masks of kind weight, whose removed weights are 0")
        if self.unit == "row":
            raise ValueError("mask_train.pattern removes single weights; it does not apply to unit: row")
        return self

    @model_validator(mode="after")
    def _multipliers_are_learned(self) -> MaskTrainOptions:
        problem = soft_mask_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _drop_resets(self) -> MaskTrainOptions:
        if self.method == "drop" and self.given().get("kind") == "weight":
            raise ValueError("mask_train.kind: weight does not apply to the method drop, which makes delta masks only")
        return self

    @model_validator(mode="after")
    def _settle(self) -> MaskTrainOptions:
        """Fills in options left unset, without marking them as given."""
        in_force = mask_train_in_force(self.given(), self.preset, self.method, self.objective)
        self.__dict__.update(
            {**in_force, **(soft_mask_in_force(self.given(), in_force) if self.mask == "soft" else {})}
        )
        return self

    @model_validator(mode="after")
    def _keys_have_their_start(self) -> MaskTrainOptions:
        fields, start = type(self).model_fields, self.start
        for name, starts in (
            ("travel", ("normal", "kaiming", "constant", "identity")),
            ("start_std", ("normal",)),
            ("start_value", ("constant",)),
        ):
            if name in self.given() and getattr(self, name) != fields[name].default and start not in starts:
                raise ValueError(f"mask_train.{name} applies only to start {', '.join(starts)}; the start is {start}")
        return self

    @property
    def keeps_last(self) -> bool:
        """True if the mask of the last step is kept; methods without training have only one."""
        return self.method == "learned" and self.keep == "last"

    @property
    def writes_multipliers(self) -> bool:
        """True if the mask file holds multipliers and no bits."""
        return self.mask == "soft" and not self.harden

    @property
    def averages_records(self) -> bool:
        """True if the loss is the mean over records instead of answer tokens."""
        return PRESETS[self.preset].averages_records

    @property
    def blocks(self) -> Pattern | None:
        """The pattern of weights to keep; None if a ratio or threshold decides."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    @property
    def masked_projections(self) -> tuple[str, ...] | None:
        """The projections that are named, also in a ratio by projection; None if all of the target are masked."""
        return tuple(self.ratio) if isinstance(self.ratio, dict) else self.projections

    def of_projection(self, projection: str) -> MaskTrainOptions:
        """Returns the options with a mask of one of the masked projections only."""
        if isinstance(self.ratio, dict):
            return self.model_copy(update={"ratio": {projection: self.ratio[projection]}})
        return self.model_copy(update={"projections": (projection,)})

    @property
    def shared_budget(self) -> float | None:
        """Share of all masked weights that ratio auto distributes; None with any other rule."""
        return (self.budget or DEFAULT_BUDGET) if self.ratio == AUTO else None

    def ratio_of(self, projection: str) -> float | None:
        """Returns the ratio of one projection, such as `q_proj`; None if a threshold or ratio auto decides."""
        if self.blocks is not None:
            return self.blocks.ratio
        if isinstance(self.ratio, str):
            return None
        return self.ratio[projection] if isinstance(self.ratio, dict) else self.ratio
