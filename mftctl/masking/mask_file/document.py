"""The JSON document of a mask file, which describes its masks; checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from mftctl.errors import MaskFormatError
from mftctl.masking.mask_file.codecs import Codec
from mftctl.masking.mask_file.fields import (
    CheckpointEntry,
    Dtype,
    Ratio,
    Scale,
    Seed,
    Sha256,
    Shape,
    Strict,
    TensorName,
    Text,
    check_counts,
)
from mftctl.masking.mask_file.strict_json import parse_strict_json, write_compact_json

FORMAT_VERSION: Final = 1
SCALED_FORMAT_VERSION: Final = 2
"""Version of masks that rescale what they keep, so that readers of version 1 refuse them."""
DELTA_FORMAT_VERSION: Final = 3
"""Version of delta files, which hold the values of changes beside the bits (`mftctl.masking.delta`)."""
SCALABLE_DTYPES: Final = ("F64", "F32", "F16", "BF16")

Kind = Literal["weight", "delta"]
D = TypeVar("D", bound=Strict)

_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The record of one masked tensor in a mask file.

    Attributes:
        shape: The tensor's shape as stored in the checkpoint.
        removed: The number of removed weights.
        sha256: Hex SHA-256 of the base tensor's raw bytes as stored in the checkpoint.
        dtype: The safetensors dtype name of the base tensor, such as "BF16".
        tuned_sha256: The same digest of the tuned tensor, for a delta mask; None for a weight mask.
    """

    shape: tuple[int, ...]
    removed: int
    sha256: str
    dtype: str
    tuned_sha256: str | None = None

    @property
    def weights(self) -> int:
        """The number of weights, kept and removed."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class MaskMetadata:
    """The origin of a mask.

    Attributes:
        kind: "weight": out = base * mask; "delta": out = base + scale * mask * (tuned - base).
        base_model: Name or folder of the model the mask was learned on.
        base_revision: Its revision on the hub.
        method: The method of selection, such as "learned" or "random".
        ratio: The requested share to remove, 0 to 1, if a ratio was used.
        threshold: The score below which weights were removed, if a threshold was used.
        layers: The masked layers, such as "4-7".
        seed: The seed of the run.
        run_id: The run that created the mask.
        tuned_model: Name or folder of the tuned model of a delta mask; None for a weight mask.
        tuned_revision: Its revision on the hub.
        scale: Factor of the kept changes of a delta mask, above 1; None if they are kept as they are.
    """

    kind: Kind = "weight"
    base_model: str
    base_revision: str | None
    method: str
    ratio: float | None
    threshold: float | None
    layers: str | None
    seed: int | None
    run_id: str | None
    tuned_model: str | None = None
    tuned_revision: str | None = None
    scale: float | None = None

    @property
    def base_label(self) -> str:
        """The base and its revision, for messages."""
        return _label(self.base_model, self.base_revision)

    @property
    def tuned_label(self) -> str | None:
        """The tuned model of a delta mask and its revision, for messages."""
        return None if self.tuned_model is None else _label(self.tuned_model, self.tuned_revision)


def _label(model: str, revision: str | None) -> str:
    return model if revision is None else f"{model} at revision {revision}"


class _TensorEntry(Strict):
    shape: Shape
    removed: Annotated[int, Field(ge=0)]
    codec: Codec
    sha256: Sha256
    dtype: Dtype
    tuned_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _counts_fit(self) -> _TensorEntry:
        check_counts(self.shape, self.removed)
        return self


class MaskDocument(Strict):
    """The JSON document of a mask file.

    Every key is required and no others are allowed; keys for the tuned checkpoint occur only in delta masks, and
    `scale` only in version 2.
    """

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=SCALED_FORMAT_VERSION)]
    kind: Kind
    bit_order: Literal["little"]
    tensors: Annotated[dict[TensorName, _TensorEntry], Field(min_length=1)]
    base: CheckpointEntry
    method: Annotated[Text, Field(min_length=1)]
    ratio: Ratio | None
    threshold: float | None
    layers: Text | None
    seed: Seed | None
    run_id: Text | None
    tuned: CheckpointEntry | None = None
    scale: Scale | None = None

    @model_validator(mode="after")
    def _scale_fits_version(self) -> MaskDocument:
        if self.format_version == FORMAT_VERSION:
            if "scale" in self.model_fields_set:
                raise ValueError(f"a document of version {FORMAT_VERSION} must not have scale")
            return self
        if self.scale is None or self.kind != "delta":
            raise ValueError(f"a document of version {self.format_version} must be a delta mask with scale")
        for name, entry in self.tensors.items():
            if entry.dtype not in SCALABLE_DTYPES:
                raise ValueError(f"with scale, tensors.{name}.dtype must be one of {', '.join(SCALABLE_DTYPES)}")
        return self

    @model_validator(mode="after")
    def _tuned_fits_kind(self) -> MaskDocument:
        parts: list[tuple[Strict, str, str]] = [(self, "tuned", "tuned")]
        parts += [(entry, "tuned_sha256", f"tensors.{name}.tuned_sha256") for name, entry in self.tensors.items()]
        for part, field, key in parts:
            if self.kind == "delta" and getattr(part, field) is None:
                raise ValueError(f"a delta mask must have {key}")
            if self.kind == "weight" and field in part.model_fields_set:
                raise ValueError(f"a weight mask must not have {key}")
        return self

    def records(self) -> dict[str, TensorRecord]:
        """The records by tensor name, in ascending order of name."""
        return {
            name: TensorRecord(tuple(entry.shape), entry.removed, entry.sha256, entry.dtype, entry.tuned_sha256)
            for name, entry in sorted(self.tensors.items())
        }

    def metadata(self) -> MaskMetadata:
        """The origin of the mask."""
        return MaskMetadata(
            kind=self.kind,
            base_model=self.base.model,
            base_revision=self.base.revision,
            method=self.method,
            ratio=self.ratio,
            threshold=self.threshold,
            layers=self.layers,
            seed=self.seed,
            run_id=self.run_id,
            tuned_model=None if self.tuned is None else self.tuned.model,
            tuned_revision=None if self.tuned is None else self.tuned.revision,
            scale=self.scale,
        )

    def to_json(self) -> bytes:
        """The document as compact JSON with sorted keys."""
        return write_compact_json(self.model_dump(exclude_unset=True), sort_keys=True)


def build_document(records: Mapping[str, TensorRecord], metadata: MaskMetadata, codec: Codec) -> MaskDocument:
    """Builds the document that describes these masks.

    Raises:
        MaskFormatError: The format does not allow a value in a record or a metadata field.
    """
    fields: dict[str, object] = {
        "format_version": FORMAT_VERSION if metadata.scale is None else SCALED_FORMAT_VERSION,
        "kind": metadata.kind,
        "bit_order": "little",
        "tensors": {name: _entry(record, codec) for name, record in records.items()},
        "base": {"model": metadata.base_model, "revision": metadata.base_revision},
        "method": metadata.method,
        "ratio": metadata.ratio,
        "threshold": metadata.threshold,
        "layers": metadata.layers,
        "seed": metadata.seed,
        "run_id": metadata.run_id,
    }
    if metadata.tuned_model is not None or metadata.tuned_revision is not None:
        fields["tuned"] = {"model": metadata.tuned_model, "revision": metadata.tuned_revision}
    if metadata.scale is not None:
        fields["scale"] = metadata.scale
    return validated(MaskDocument, fields, path=None)


def parse_document(text: bytes, path: Path) -> MaskDocument:
    """Parses and checks the document of an untrusted mask file.

    Raises:
        MaskFormatError: It is not JSON, has an unknown version, or violates the format.
    """
    fields = parse_fields(text, path)
    version = version_of(fields)
    if version == DELTA_FORMAT_VERSION:
        is_soft = isinstance(fields, dict) and fields.get("kind") == "scale"
        raise MaskFormatError(
            "This is a soft mask, which holds multipliers, but a mask of bits is needed."
            if is_soft
            else "This is a delta file, which holds a whole fine-tuning, but a mask file is needed.",
            path=path,
            key="format_version",
            expected=f"{FORMAT_VERSION} or {SCALED_FORMAT_VERSION}",
            actual=version,
            hint=f"mftctl apply, eval, generate and mask info take {'soft masks' if is_soft else 'delta files'}",
        )
    if version is not None and version not in (FORMAT_VERSION, SCALED_FORMAT_VERSION):
        raise unknown_version(version, path)
    return validated(MaskDocument, fields, path)


def parse_fields(text: bytes, path: Path) -> object:
    """Parses the document of an untrusted file, of any version.

    Raises:
        MaskFormatError: It is not JSON.
    """
    try:
        return parse_strict_json(text)
    except ValueError as error:
        raise MaskFormatError(
            "The document of the mask file is not valid JSON.",
            path=path,
            key="mftctl",
            actual=shown(error),
            hint="copy the file again from its source",
        ) from error


def version_of(fields: object) -> int | None:
    """The format version in a parsed document; None if it states none."""
    version = fields.get("format_version") if isinstance(fields, dict) else None
    return version if type(version) is int else None


def unknown_version(version: int, path: Path) -> MaskFormatError:
    """The error for a format version that this version of mftctl does not know."""
    return MaskFormatError(
        "This version of mftctl does not support the mask file's format version.",
        path=path,
        key="format_version",
        expected=f"{FORMAT_VERSION} to {DELTA_FORMAT_VERSION}",
        actual=shown(version),
        hint="update mftctl: pip install --upgrade mftctl",
    )


def shown(value: object) -> str:
    """A value from an untrusted file, shortened and made printable for a message."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else repr(value)
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= _SHOWN_CHARACTERS else f"{printable[:_SHOWN_CHARACTERS]}..."


def _entry(record: TensorRecord, codec: Codec) -> dict[str, object]:
    entry: dict[str, object] = {
        "shape": list(record.shape),
        "removed": record.removed,
        "codec": codec,
        "sha256": record.sha256,
        "dtype": record.dtype,
    }
    if record.tuned_sha256 is not None:
        entry["tuned_sha256"] = record.tuned_sha256
    return entry


def validated(document: type[D], fields: Any, path: Path | None) -> D:
    """The document with these fields.

    Args:
        document: The class of the document.
        fields: The parsed document.
        path: The file, if there is one.

    Raises:
        MaskFormatError: A field violates the format.
    """
    try:
        return document.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise MaskFormatError(
            "The mask's document violates the format.",
            path=path,
            key=shown(".".join(map(str, first["loc"])) or "mftctl"),
            expected=first["msg"],
            actual=shown(first["input"]),
            hint="copy the mask file again from its source, or train the mask again",
        ) from error
