"""Recipes: what a command or an experiment is to do, strict and with every default in one place.

A recipe is a YAML file. Shared keys (`model`, `data`, `seed`, ...) stand at the top, one section a command below, and
`stages` for a whole experiment. Precedence: option > `--set` > recipe > default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mftctl.data.sources import DataSource
from mftctl.errors import DataError

DEFAULT_RATIO = 0.1


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
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["auto", "fp32", "bf16"]


class TrainingOptions(_Section):
    """How long and how fast, the same words for `fft` and `mask-train`."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; overrides epochs.")
    batch_size: int = Field(8, gt=0, description="Records a forward pass, on each device.")
    grad_accum_steps: int = Field(1, gt=0, description="Forward passes an optimizer step.")
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are cut at the end.")
    warmup_ratio: Share = Field(0.03, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 does not clip.")
    precision: Precision = Field("auto", description="auto: bf16 on a GPU that has it, else fp32.")
    gradient_checkpointing: bool = Field(False, description="Save memory by computing activations twice.")
    eval_steps: int | None = Field(None, gt=0, description="Steps between two validations; a tenth of all by default.")
    patience: int | None = Field(None, gt=0, description="Stop after this many validations without a new best.")


class FftOptions(TrainingOptions):
    """Full fine-tuning."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak of the linear schedule.")
    keep: Literal["best", "last"] = Field("best", description="best: the state with the lowest validation loss.")


class MaskTrainOptions(TrainingOptions):
    """Learning a mask on a frozen model."""

    method: Literal["learned", "random", "magnitude"] = Field(
        "learned", description="learned: Mask Fine-Tuning; random and magnitude: baselines without training."
    )
    layers: str | None = Field(
        None, description='Decoder layers, such as "4-7", "0,3,8-11" or "all"; the probe\'s by default.'
    )
    target: Literal["attn", "mlp", "both"] = Field("both", description="Projections that carry a mask.")
    ratio: Share | None = Field(None, description="Share of the weights removed of each tensor; 0.1 by default.")
    threshold: float | None = Field(None, description="Remove scores below this instead of a fixed ratio.")
    ranking: Literal["magnitude", "signed"] = Field("magnitude", description="A ratio ranks |score| or the score.")
    start: Literal["kaiming", "constant"] = Field("kaiming", description="Scores at the start: random or all equal.")
    start_value: float = Field(0.01, description="The score of the constant start.")
    learning_rate: float | Literal["auto"] = Field(
        "auto", description="auto: scaled to the scores, so that a step count or a model size changes nothing."
    )
    travel: float = Field(1.6, gt=0, description="How far auto lets a score move, in units of the scores' start scale.")

    @model_validator(mode="after")
    def _one_indicator(self) -> MaskTrainOptions:
        if self.ratio is not None and self.threshold is not None:
            raise ValueError("give either a ratio or a threshold, not both")
        if self.threshold is not None and self.method != "learned":
            raise ValueError(f"a threshold needs learned scores; the {self.method} mask takes a ratio")
        return self

    @property
    def effective_ratio(self) -> float | None:
        """The ratio in force: None where a threshold decides."""
        return self.ratio if self.ratio is not None or self.threshold is not None else DEFAULT_RATIO


class ProbeOptions(_Section):
    """Which layers gain from a mask; trains with the `mask_train` section."""

    groups: tuple[int, ...] = Field((4,), min_length=1, strict=False, description="Consecutive layers a group.")
    data_fraction: float = Field(0.1, gt=0, le=1, description="Share of the training data used.")
    layers: str | None = Field(None, description="Probe only these decoder layers; all by default.")
    epochs: float | None = Field(None, gt=0, description="Passes over that share; mask_train's by default.")


class EvalOptions(_Section):
    """What is measured, and on what."""

    tasks: tuple[str, ...] = Field((), strict=False, description="Benchmarks: gsm8k (8-shot) or gsm8k_0shot.")
    task_data: dict[str, str] = Field(default_factory=dict, description="Local file of a benchmark, NAME=PATH.")
    limit: int | None = Field(None, gt=0, description="Only the first so many problems or records.")
    batch_size: int = Field(8, gt=0, description="Benchmark prompts a forward pass.")
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are cut at the end.")
    generate: bool = Field(True, description="Generate answers for exact match, besides the loss.")


class Stage(_Section):
    """One step of an experiment."""

    command: Literal["fft", "probe", "mask-train", "apply", "eval"] = Field(description="What the stage does.")
    after: str | None = Field(None, description="The stage whose model is the input; the recipe's model by default.")
    layers_from: str | None = Field(None, description="The probe stage that chooses the layers.")
    of: tuple[str, ...] = Field((), strict=False, description="eval: the stages whose models are evaluated.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted recipe keys changed for this stage.")


class Recipe(_Section):
    """Everything a command or an experiment needs to know."""

    name: str | None = Field(None, description="Name of the experiment.")
    description: str | None = Field(None, description="One line about the experiment.")
    model: str | None = Field(None, description="Checkpoint folder, hub id, or quickstart for the built-in model.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    data: Sources = Field((), description="Training data: files or hub ids, FILE=COUNT for a part.")
    val_data: Sources = Field((), description="Validation data; split off the training data by default.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Share split off for validation.")
    test_data: Sources = Field((), description="Data that eval measures on.")
    seed: int = Field(0, ge=0, description="Decides order, splits and random starts.")
    seeds: tuple[int, ...] = Field((), strict=False, description="run: repeat the experiment for each.")
    fft: FftOptions = FftOptions()
    probe: ProbeOptions = ProbeOptions()
    mask_train: MaskTrainOptions = MaskTrainOptions()
    eval: EvalOptions = EvalOptions()
    stages: dict[str, Stage] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _stages_refer_backwards(self) -> Recipe:
        known: set[str] = set()
        for name, stage in self.stages.items():
            for other in filter(None, (stage.after, stage.layers_from, *stage.of)):
                if other not in known:
                    raise ValueError(f"stage {name} needs stage {other}, which does not stand before it")
            known.add(name)
        return self


_SHARED = {"model", "revision", "data", "val_data", "val_fraction", "test_data", "seed"}
_SECTIONS = {"fft": {"fft"}, "probe": {"probe", "mask_train"}, "mask-train": {"mask_train"}, "eval": {"eval"}}


def to_document(recipe: Recipe) -> dict[str, Any]:
    """A recipe without its stages as plain data that reads back as the same recipe: the `config` of a run."""
    return recipe.model_dump(mode="json", exclude={"stages", "seeds"}, exclude_none=True)


def deciding_keys(recipe: Recipe, command: str) -> dict[str, Any]:
    """The part of a recipe on which a command's result depends, as plain data."""
    return recipe.model_dump(mode="json", include=_SHARED | _SECTIONS.get(command, set()))
