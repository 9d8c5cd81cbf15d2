"""The recipe section `delta`: what to store of a fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mftctl.experiments.section import Section
from mftctl.experiments.training_options import Share

DeltaValues = Literal["exact", "bf16", "int8", "sign"]
DeltaSelect = Literal["trivial", "random", "learned", "fisher"]
DeltaPart = Literal["embeddings", "head", "vectors"]


class DeltaOptions(Section):
    """Settings for what a delta file stores of a fine-tuning."""

    ratio: Share = Field(
        0.0, description="Share of the changes of each matrix to leave out; vectors, such as norms, are stored whole."
    )
    select: DeltaSelect = Field(
        "trivial",
        description="Changes to leave out. trivial: the smallest; random: any, which takes no room for bits; learned: "
        "those that a delta mask learned on the data resets; fisher: those with the smallest effect on the data, by "
        "squared gradient times squared change.",
    )
    mask: str | None = Field(
        None, description="A delta mask (mask-train --kind delta, --method drop) that decides for the tensors in it."
    )
    values: DeltaValues = Field(
        "exact",
        description="Values of the other changes. exact: bit for bit; bf16: rounded to 16 bits; int8: to 8 bits with "
        "one scale per 128; sign: the sign with one scale per tensor, as BitDelta.",
    )
    rescale: bool = Field(False, description="random: multiply the stored changes by 1 / (1 - ratio), as DARE does.")
    exclude: tuple[DeltaPart, ...] = Field(
        (),
        strict=False,
        description="Parts whose changes are left out: embeddings, head, vectors (norms and biases).",
    )
    codec: Literal["deflate", "ans", "packed"] = Field(
        "deflate",
        description="Encoding of which changes are stored. ans: at the entropy, needs the ans extra, also for reading.",
    )
    base: str | None = Field(None, description="The model before fine-tuning; by default that of the fft run.")

    @model_validator(mode="after")
    def _only_random_changes_are_rescaled(self) -> DeltaOptions:
        if self.rescale and (self.select != "random" or self.mask is not None):
            raise ValueError("delta.rescale applies only to select random, without a mask")
        return self

    @property
    def needs_data(self) -> bool:
        """True if the data decides which changes to leave out."""
        return self.select in ("learned", "fisher")

    @model_validator(mode="after")
    def _data_decides_about_a_share(self) -> DeltaOptions:
        if self.needs_data and (self.ratio == 0 or self.mask is not None):
            raise ValueError(f"delta.select {self.select} needs a ratio above 0, and no mask")
        return self

    @model_validator(mode="after")
    def _parts_differ(self) -> DeltaOptions:
        if len(set(self.exclude)) < len(self.exclude):
            raise ValueError(f"delta.exclude names a part twice: {', '.join(self.exclude)}")
        return self
