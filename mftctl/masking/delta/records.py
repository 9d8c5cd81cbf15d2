"""What a delta file says of the tensors of a base, and of its own origin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mftctl.masking.delta.value_codecs import ValuesCodec
from mftctl.masking.delta.values import ValuesKind
from mftctl.masking.dtypes import item_bytes
from mftctl.masking.mask_file.codecs import Codec

BitsCodec = Codec | Literal["seeded", "all"]
"""Codecs of the bits: those of masks; 16 bytes from which they follow; or none, as every entry is kept."""

DeltaKind = Literal["delta", "scale"]
"""A fine-tuning, or a soft mask, which multiplies weights of the base."""

LeftOutReason = Literal["dropped", "excluded"]
"""Why a change is not in the file: the ratio left none of its entries, or the user excluded the tensor."""


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """A tensor of the base that the file does not change.

    Attributes:
        shape: Its shape as stored in the checkpoint.
        dtype: Its safetensors dtype name, of any kind.
        sha256: Hex SHA-256 of its raw bytes as stored in the checkpoint.
        length_bytes: Their number.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    length_bytes: int


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor of the base that the file changes.

    Attributes:
        shape: Its shape as stored in the checkpoint.
        dtype: Its safetensors dtype name, such as "BF16".
        sha256: Hex SHA-256 of the base's raw bytes.
        result_sha256: The same digest of the changed tensor.
        removed: The number of entries that keep the base's value.
        codec: Codec of the bits.
        values: Kind of the values.
        values_codec: Codec of the values.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    result_sha256: str
    removed: int
    codec: BitsCodec
    values: ValuesKind
    values_codec: ValuesCodec

    @property
    def weights(self) -> int:
        """The number of entries, changed or not."""
        return math.prod(self.shape)

    @property
    def length_bytes(self) -> int:
        """The number of bytes of the tensor in the checkpoint."""
        return self.weights * item_bytes(self.dtype)

    @property
    def kept(self) -> int:
        """The number of entries that stay changed."""
        return self.weights - self.removed


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that fine-tuning changed, but the file does not.

    Attributes:
        tensor: The tensor.
        reason: Why the file leaves its change out.
    """

    tensor: BaseTensor
    reason: LeftOutReason


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A text file of the fine-tuned checkpoint that goes with its weights, such as a chat template.

    Attributes:
        size_bytes: Its size.
        sha256: Hex SHA-256 of its content.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model: its name or folder, and its revision on the hub."""

    model: str
    revision: str | None = None

    @property
    def label(self) -> str:
        """The model and its revision, for messages."""
        return self.model if self.revision is None else f"{self.model} at revision {self.revision}"


@dataclass(frozen=True, kw_only=True)
class DeltaMetadata:
    """The origin of a delta file.

    Attributes:
        values: The requested kind of values; vectors such as norms are exact in any case.
        base: The model before fine-tuning.
        tuned: The fine-tuned model, or all of them if several deltas were merged; none for a soft mask.
        method: How the kept entries were selected, such as "trivial", or how deltas were merged.
        ratio: The requested share of each matrix that keeps the base's value.
        scale: The factor that kept changes were multiplied by, above 1; None if they were kept as they are. The values
            contain it.
        seed: The seed of the selection.
        run_id: The run that created the file.
    """

    values: ValuesKind
    base: NamedModel
    tuned: tuple[NamedModel, ...]
    method: str
    ratio: float | None = None
    scale: float | None = None
    seed: int | None = None
    run_id: str | None = None

    @property
    def kind(self) -> DeltaKind:
        """What the file holds."""
        return "scale" if self.values == "scale" else "delta"
