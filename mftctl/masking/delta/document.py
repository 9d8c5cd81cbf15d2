"""The JSON document of a delta file; checked field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from mftctl.errors import MaskFormatError
from mftctl.masking.delta.records import (
    BaseTensor,
    BitsCodec,
    CarriedFile,
    ChangedTensor,
    DeltaKind,
    DeltaMetadata,
    LeftOut,
    LeftOutReason,
    NamedModel,
)
from mftctl.masking.delta.value_codecs import ValuesCodec
from mftctl.masking.delta.values import ValuesKind
from mftctl.masking.mask_file.document import (
    DELTA_FORMAT_VERSION,
    SCALABLE_DTYPES,
    parse_fields,
    unknown_version,
    validated,
    version_of,
)
from mftctl.masking.mask_file.fields import (
    MAX_DIMENSIONS,
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
from mftctl.masking.mask_file.strict_json import write_compact_json

VALUES: Final = "values:"
FILE: Final = "file:"
"""Prefixes of the payloads beside the bits, which no tensor's name may have."""

CARRIED_FILES: Final = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that a delta file may hold: text that goes with weights, and no code."""

MAX_FILE_BYTES: Final = 2**26


@dataclass(frozen=True, slots=True)
class DeltaContents:
    """Everything that the document of a delta file says.

    Attributes:
        metadata: The origin of the file.
        tensors: The changed tensors by name, in ascending order.
        unchanged: The other tensors of the base.
        left_out: The tensors whose change the file leaves out.
        files: The files that replace those of the base.
    """

    metadata: DeltaMetadata
    tensors: Mapping[str, ChangedTensor]
    unchanged: Mapping[str, BaseTensor]
    left_out: Mapping[str, LeftOut]
    files: Mapping[str, CarriedFile]

    def base_tensors(self) -> dict[str, BaseTensor]:
        """All tensors of the base, by name."""
        changed = {
            name: BaseTensor(one.shape, one.dtype, one.sha256, one.length_bytes) for name, one in self.tensors.items()
        }
        return {**changed, **self.unchanged, **{name: one.tensor for name, one in self.left_out.items()}}

    @property
    def base_bytes(self) -> int:
        """The size of the base's tensors."""
        return sum(tensor.length_bytes for tensor in self.base_tensors().values())

    def payload_names(self) -> set[str]:
        """The names of the payloads that the file must hold."""
        bits = {name for name, record in self.tensors.items() if record.codec != "all"}
        return bits | {VALUES + name for name in self.tensors} | {FILE + name for name in self.files}


def _unprefixed(name: str) -> str:
    if name.startswith((VALUES, FILE)):
        raise ValueError(f"a tensor name must not start with {VALUES} or {FILE}")
    return name


_Name = Annotated[TensorName, AfterValidator(_unprefixed)]


class _ChangedEntry(Strict):
    shape: Shape
    dtype: Dtype
    sha256: Sha256
    result_sha256: Sha256
    removed: Annotated[int, Field(ge=0)]
    codec: BitsCodec
    values: ValuesKind
    values_codec: ValuesCodec

    @model_validator(mode="after")
    def _counts_fit(self) -> _ChangedEntry:
        check_counts(self.shape, self.removed)
        record = self.record()
        if record.kept == 0 and self.values != "scale":
            raise ValueError("a changed tensor must have a changed entry")
        if self.codec == "all" and self.removed:
            raise ValueError(f"codec all keeps every entry, but {self.removed} are removed")
        if self.values != "exact" and self.dtype not in SCALABLE_DTYPES:
            raise ValueError(f"values of {self.dtype} must be exact")
        return self

    def record(self) -> ChangedTensor:
        """The record of the tensor."""
        return ChangedTensor(**{**self.model_dump(), "shape": tuple(self.shape)})


class _BaseEntry(Strict):
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_DIMENSIONS)]
    dtype: Annotated[Text, Field(min_length=1)]
    sha256: Sha256
    length_bytes: Annotated[int, Field(ge=0)]

    def tensor(self) -> BaseTensor:
        """The tensor."""
        return BaseTensor(tuple(self.shape), self.dtype, self.sha256, self.length_bytes)


class _LeftOutEntry(_BaseEntry):
    reason: LeftOutReason


class _FileEntry(Strict):
    size_bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


def _carried(name: str) -> str:
    if name not in CARRIED_FILES:
        raise ValueError(f"a carried file must be one of {', '.join(CARRIED_FILES)}")
    return name


class DeltaDocument(Strict):
    """The JSON document of a delta file; every key is required and no others are allowed."""

    format_version: Literal[3]
    kind: DeltaKind
    bit_order: Literal["little"]
    values: ValuesKind
    tensors: Annotated[dict[_Name, _ChangedEntry], Field(min_length=1)]
    unchanged: dict[_Name, _BaseEntry]
    left_out: dict[_Name, _LeftOutEntry]
    files: dict[Annotated[str, AfterValidator(_carried)], _FileEntry]
    base: CheckpointEntry
    tuned: list[CheckpointEntry]
    method: Annotated[Text, Field(min_length=1)]
    ratio: Ratio | None
    scale: Scale | None
    seed: Seed | None
    run_id: Text | None

    @model_validator(mode="after")
    def _named_once(self) -> DeltaDocument:
        names = [*self.tensors, *self.unchanged, *self.left_out]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} is both changed and not")
        return self

    @model_validator(mode="after")
    def _kind_fits(self) -> DeltaDocument:
        is_soft = self.kind == "scale"
        if is_soft != (self.values == "scale"):
            raise ValueError("values are of kind scale in a soft mask, and only there")
        if is_soft != (not self.tuned):
            raise ValueError("a delta file names its fine-tuned models, and a soft mask has none")
        for name, entry in self.tensors.items():
            if is_soft and entry.values != "scale":
                raise ValueError(f"tensors.{name}.values of a soft mask must be of kind scale")
            if not is_soft and entry.values == "scale":
                raise ValueError(f"tensors.{name}.values must not be of kind scale in a delta file")
        if is_soft and (self.left_out or self.files or self.scale is not None):
            raise ValueError("a soft mask leaves out no tensor, carries no files and has no scale")
        return self

    def contents(self) -> DeltaContents:
        """What the document says."""
        metadata = DeltaMetadata(
            values=self.values,
            base=NamedModel(self.base.model, self.base.revision),
            tuned=tuple(NamedModel(one.model, one.revision) for one in self.tuned),
            method=self.method,
            ratio=self.ratio,
            scale=self.scale,
            seed=self.seed,
            run_id=self.run_id,
        )
        return DeltaContents(
            metadata,
            tensors={name: entry.record() for name, entry in sorted(self.tensors.items())},
            unchanged={name: entry.tensor() for name, entry in sorted(self.unchanged.items())},
            left_out={name: LeftOut(entry.tensor(), entry.reason) for name, entry in sorted(self.left_out.items())},
            files={name: CarriedFile(one.size_bytes, one.sha256) for name, one in sorted(self.files.items())},
        )


def write_document(contents: DeltaContents) -> bytes:
    """The document as compact JSON with sorted keys.

    Raises:
        MaskFormatError: The format does not allow a value.
    """
    metadata = contents.metadata
    fields: dict[str, object] = {
        "format_version": DELTA_FORMAT_VERSION,
        "kind": metadata.kind,
        "bit_order": "little",
        "values": metadata.values,
        "tensors": {name: _entry(record) for name, record in contents.tensors.items()},
        "unchanged": {name: _entry(tensor) for name, tensor in contents.unchanged.items()},
        "left_out": {name: {**_entry(one.tensor), "reason": one.reason} for name, one in contents.left_out.items()},
        "files": {name: asdict(file) for name, file in contents.files.items()},
        "base": asdict(metadata.base),
        "tuned": [asdict(model) for model in metadata.tuned],
        "method": metadata.method,
        "ratio": metadata.ratio,
        "scale": metadata.scale,
        "seed": metadata.seed,
        "run_id": metadata.run_id,
    }
    return write_compact_json(validated(DeltaDocument, fields, None).model_dump(), sort_keys=True)


def parse_delta_document(text: bytes, path: Path) -> DeltaContents:
    """What the document of an untrusted delta file says.

    Raises:
        MaskFormatError: It is not JSON, has another version, or violates the format.
    """
    fields = parse_fields(text, path)
    version = version_of(fields)
    if version is not None and version < DELTA_FORMAT_VERSION:
        raise MaskFormatError(
            "This is a mask file, not a delta file.",
            path=path,
            key="format_version",
            expected=DELTA_FORMAT_VERSION,
            actual=version,
            hint="mftctl delta BASE TUNED makes delta files",
        )
    if version is not None and version > DELTA_FORMAT_VERSION:
        raise unknown_version(version, path)
    return validated(DeltaDocument, fields, path).contents()


def is_delta_document(text: bytes, path: Path) -> bool:
    """True if a document is that of a delta file, valid or not.

    Raises:
        MaskFormatError: It is not JSON.
    """
    return version_of(parse_fields(text, path)) == DELTA_FORMAT_VERSION


def kind_of_document(text: bytes, path: Path) -> object:
    """The kind stated in a document of this version; None for another version.

    Raises:
        MaskFormatError: It is not JSON.
    """
    fields = parse_fields(text, path)
    return fields.get("kind") if version_of(fields) == DELTA_FORMAT_VERSION and isinstance(fields, dict) else None


def require_payloads(contents: DeltaContents, names: Iterable[str], path: Path) -> None:
    """Checks that a file holds the payloads that its document describes, and no others.

    Raises:
        MaskFormatError: One is missing or not described.
    """
    found, expected = set(names), contents.payload_names()
    if found == expected:
        return
    name = min(found ^ expected)
    raise MaskFormatError(
        "The payloads of the delta file are not those that its document describes.",
        path=path,
        key=name,
        expected="described and present",
        actual="not described" if name in found else "missing",
        hint="copy the file again from its source",
    )


def _entry(record: ChangedTensor | BaseTensor) -> dict[str, object]:
    return {**asdict(record), "shape": list(record.shape)}
