"""Import and export of masks in the file formats of other implementations.

Two formats are supported. On import they are recognised by content, on export chosen by the file suffix:

`.pt`
    The reference implementation's `masks.pt` (repository Ming-K9/MFT): a pickled dict from module name to a tensor of
    the weight's shape, 1 = keep and 0 = removed. Written with float32 tensors under names without `.weight`, as its
    loader expects: it multiplies by them and takes their mean, which torch supports only for floating point.
`.npz`
    Packed bits as distributed by MaskLLM (repository NVlabs/MaskLLM): one uint8 array per weight, under its name plus
    `.mask`, with row-major bits in the order of `numpy.packbits` (the first weight is the highest bit of a byte). The
    shape is that of the model's weight. MaskLLM's own loader needs a multiple of 8 weights.

Neither format states which model a mask belongs to or includes a digest. Importing ties a mask to the given base, and
damage is detected from then on.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from mftctl.errors import MaskFileError, MaskFormatError, MaskMismatchError
from mftctl.files.atomic import Permit, atomic_file
from mftctl.files.json_files import read_json_object
from mftctl.files.ownership import permit_file
from mftctl.files.regular import open_regular
from mftctl.masking.checkpoints.apply_in_memory import checkpoint_names
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_digest, tensor_index
from mftctl.masking.dtypes import TORCH_DTYPES
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import count_kept
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord, shown
from mftctl.workflows.mask_exchange.maskllm_npz import MASK_SUFFIX, NpzMasks, write_npz
from mftctl.workflows.mask_exchange.reference_pt import TorchMasks, write_torch

_WRITERS: Final[dict[str, Callable[[Mask, BinaryIO], None]]] = {".pt": write_torch, ".npz": write_npz}
_WEIGHT_SUFFIX: Final = ".weight"
_ZIP_START: Final = b"PK"
_PICKLE_START: Final = b"\x80"
_PICKLE_MEMBER: Final = "data.pkl"
_EXPORTED: Final = b"exported by mftctl"
"""The archive comment that marks a file as replaceable."""
_KINDS: Final = "masks.pt of the reference implementation, or an .npz file of packed bits as distributed by MaskLLM"


def import_mask(
    file: Path, base: Path, *, base_model: str, base_revision: str | None = None, run_id: str | None = None
) -> Mask:
    """Imports a weight mask from another implementation's file and ties it to a base.

    Names may lack `.weight`, may end in `.mask`, and may have or lack the model's prefix, such as `transformer.`.

    Args:
        file: A possibly untrusted file; no code in it is run.
        base: Folder of the checkpoint that the mask was learned on; the file holds nothing to verify this.
        base_model: Name of the base for the mask file.
        base_revision: Its revision on the hub.
        run_id: The run that imports it.

    Raises:
        MaskFormatError: The file cannot be read, is damaged or in an unknown format, or a value is neither 0 nor 1.
        MaskMismatchError: A name is not in the base or occurs twice, or a shape or size does not match the base.
        ModelError: The base cannot be read.
    """
    masks = _open(file)
    index = tensor_index(base)
    targets = _targets(masks.names(), index, base, file)
    packed, records = {}, {}
    for name, stored in targets.items():
        bits = masks.packed(name, stored.shape)
        packed[stored.name] = bits
        records[stored.name] = TensorRecord(
            shape=stored.shape,
            removed=math.prod(stored.shape) - count_kept(bits),
            sha256=tensor_digest(stored),
            dtype=stored.dtype,
        )
    metadata = MaskMetadata(
        kind="weight",
        base_model=base_model,
        base_revision=base_revision,
        method="imported",
        ratio=None,
        threshold=None,
        layers=None,
        seed=None,
        run_id=run_id,
    )
    return Mask.from_packed(packed, records, metadata)


def export_permit(agreed: bool) -> Permit:
    """A permit to replace a file that `export_mask` wrote, if the user agreed."""
    return permit_file("a mask that mftctl exported", _is_exported, replace=agreed)


def _is_exported(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment == _EXPORTED
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return False


def export_mask(mask: Mask, file: Path, permit: Permit | None = None) -> None:
    """Exports the mask for another implementation, atomically, replacing an existing file.

    Args:
        mask: A weight mask.
        file: `.pt` takes 4 bytes per weight, in memory too; `.npz` at most 1 bit. Missing parent folders are created.
        permit: Decides whether an existing `file` may be replaced; None replaces any file.

    Raises:
        MaskFileError: The mask is of kind "delta", the suffix is unknown, or the file cannot be written.
    """
    if mask.metadata.kind != "weight":
        raise MaskFileError(
            "A delta mask cannot be exported: the other formats support only removed weights, not reset ones.",
            key="kind",
            expected="weight",
            actual=mask.metadata.kind,
            hint="apply it and share the resulting checkpoint instead (mftctl apply)",
        )
    write = _WRITERS.get(file.suffix)
    if write is None:
        raise MaskFileError(
            "The file suffix is not a known export format.",
            path=file,
            expected=" or ".join(_WRITERS),
            actual=file.suffix or "no suffix",
            hint="with -o, give a name such as masks.pt, masks.npz or small.bits (a mask file)",
        )
    try:
        with atomic_file(file, permit) as temporary:
            with temporary.open("wb") as stream:
                write(mask, stream)
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = _EXPORTED
    except OSError as error:
        raise MaskFileError(
            "The exported mask cannot be written.",
            path=file,
            actual=error.strerror or str(error),
            hint="give another path with -o, or free some space",
        ) from error


def _open(file: Path) -> TorchMasks | NpzMasks:
    """The reader for the file's format, recognised by its first bytes and members."""
    try:
        with open_regular(file) as stream:
            start = stream.read(4)
        members = _members(file) if start.startswith(_ZIP_START) else []
    except OSError as error:
        raise MaskFormatError(
            "The file cannot be read.",
            path=file,
            actual=error.strerror or str(error),
            hint="give the path of a file such as masks.pt or mask_compressed.npz",
        ) from error
    if start.startswith(_PICKLE_START) or any(PurePosixPath(member).name == _PICKLE_MEMBER for member in members):
        return TorchMasks(file)
    if members:
        return NpzMasks(file)
    raise MaskFormatError(
        "The file is not in a format that can be imported.",
        path=file,
        expected=_KINDS,
        actual=f"a file that starts with {start!r}" if start else "an empty file",
        hint="mftctl's own mask files need no import",
    )


def _members(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise MaskFormatError(
            "The archive is damaged or truncated.", path=file, actual=shown(error), hint="copy the file again"
        ) from error


def _targets(
    names: Iterable[str], index: Mapping[str, StoredTensor], base: Path, file: Path
) -> dict[str, StoredTensor]:
    """Maps each name in the file to the base's tensor."""
    targets: dict[str, StoredTensor] = {}
    taken: dict[str, str] = {}
    for name in names:
        stored = index[_checkpoint_name(name, index, base, file)]
        if stored.name in taken:
            raise MaskMismatchError(
                "Two masks in the file are for the same weight.",
                path=file,
                key=stored.name,
                actual=f"{shown(taken[stored.name])} and {shown(name)}",
                hint="keep one of them",
            )
        if stored.dtype not in TORCH_DTYPES:
            raise MaskMismatchError(
                "A mask refers to a tensor in the base that is not floating point.",
                path=file,
                key=shown(name),
                expected=", ".join(TORCH_DTYPES),
                actual=stored.dtype,
                hint="with -m, give the base that the mask was learned on, not a quantised copy",
            )
        taken[stored.name] = name
        targets[name] = stored
    return targets


def _checkpoint_name(name: str, index: Mapping[str, StoredTensor], base: Path, file: Path) -> str:
    bare = name.removesuffix(MASK_SUFFIX)
    weight = bare.removesuffix(_WEIGHT_SUFFIX) + _WEIGHT_SUFFIX
    for candidate in (bare, weight):
        if candidate in index:
            return candidate
    try:
        return checkpoint_names([weight], index, _base_model_prefix(base))[weight]
    except MaskMismatchError as error:
        raise MaskMismatchError(
            "A mask refers to a weight that the base does not have.",
            path=file,
            key=shown(name),
            expected=f"one of the weights of {base}, such as {min(index)}",
            actual=shown(weight),
            hint="with -m, give the base that the mask was learned on",
        ) from error


def _base_model_prefix(folder: Path) -> str:
    """The prefix that the model's parameter names may have but the checkpoint's lack, such as `transformer`.

    Args:
        folder: A checkpoint. For a model type unknown to transformers the prefix is empty, so names must match exactly.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model_type = read_json_object(folder / "config.json")["model_type"]
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return str(model_class.base_model_prefix)
