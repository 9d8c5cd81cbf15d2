"""Matches the tensors of a base with those of a checkpoint tuned from it.

Both have the same tensors under the same names, with two exceptions. A checkpoint whose output head is tied to its
input embeddings may store the head or omit it. Files from older transformers versions contain buffers that are not
learned but computed when a model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_digest, tensor_index
from mftctl.masking.dtypes import TORCH_DTYPES
from mftctl.masking.mask_file.fields import MAX_DIMENSIONS

HEAD: Final = "lm_head.weight"
"""The output head, tied to the input embeddings in many models."""

_EMBEDDINGS: Final = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")
_POSITIONS: Final = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)\.weight$")
_HEADS: Final = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")
_COMPUTED: Final = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor of a tuned checkpoint and the base's values for it.

    Attributes:
        name: Its name in the tuned checkpoint, or the base's (`pair_base_tensors`).
        base: The base's tensor, of the same dtype and shape; for a tied output head, its input embeddings.
        tuned: The tuned tensor.
    """

    name: str
    base: StoredTensor
    tuned: StoredTensor


def counterpart(name: str, index: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The tensor that a checkpoint uses for this name, if it has one.

    Args:
        name: A tensor's name in another checkpoint of the same model.
        index: The checkpoint's tensors. If it stores no output head, its input embeddings are used as the head.
    """
    if name in index or name != HEAD:
        return index.get(name)
    return _embeddings(index)


def pair_tensors(base: Path, tuned: Path) -> list[TensorPair]:
    """Pairs every floating-point tensor of the tuned checkpoint with the base's, in ascending order of name.

    Buffers that are computed when a model is built are left out. A tensor that no mask can describe, such as an integer
    tensor, must be the same in both.

    Args:
        base: The base's folder.
        tuned: The folder of the checkpoint tuned from it. The two may be sharded differently.

    Raises:
        MaskMismatchError: A tensor is in only one of them, differs in dtype or shape, or is not floating point and
            differs; or the base has a separate output head and the tuned checkpoint ties its head.
        ModelError: One of them cannot be read.
    """
    base_index, tuned_index = tensor_index(base), tensor_index(tuned)
    _require_tied_head(base_index, tuned_index, base, tuned)
    if _is_tied(base_index):
        base_index.pop(HEAD, None)
    pairs = []
    for name in sorted({*base_index, *tuned_index}):
        if _COMPUTED.search(name):
            continue
        pair = _paired(name, base_index, tuned_index, base, tuned)
        if _is_maskable(pair.tuned):
            pairs.append(pair)
        else:
            _require_same_bytes(pair)
    return pairs


def pair_base_tensors(base: Path, tuned: Path) -> list[TensorPair]:
    """Pairs every floating-point tensor of the base with the tuned checkpoint's, in ascending order of name.

    Unlike `pair_tensors`, the names are those of the base, in whose files the changes are to be written. A tied output
    head that only one of them stores is paired with the other's input embeddings.

    Args:
        base: The base's folder.
        tuned: The folder of the checkpoint tuned from it. The two may be sharded differently.

    Raises:
        MaskMismatchError: As for `pair_tensors`; or the tuned checkpoint has a separate output head, while the base
            ties its head.
        ModelError: One of them cannot be read.
    """
    base_index, tuned_index = tensor_index(base), tensor_index(tuned)
    _require_tied_head(base_index, tuned_index, base, tuned)
    if HEAD in tuned_index and HEAD not in base_index:
        if not _is_tied(tuned_index):
            raise MaskMismatchError(
                "The tuned checkpoint has a separate output head, but the base ties its head to its embeddings.",
                path=tuned,
                key=HEAD,
                expected=f"not stored, as in the base {base}, or equal to the embeddings",
                actual="other values than the embeddings",
                hint="give the checkpoint that the tuned one was trained from",
            )
        del tuned_index[HEAD]
    embeddings = _embeddings(base_index) if _is_tied(base_index) else None
    pairs = []
    for name in sorted({*base_index, *tuned_index}):
        if _COMPUTED.search(name):
            continue
        pair = _paired(name, base_index, tuned_index, base, tuned)
        if name == HEAD and embeddings is not None:
            pair = replace(pair, base=embeddings)  # the same bytes, by the name that both copies share
        if _is_maskable(pair.base):
            pairs.append(pair)
        else:
            _require_same_bytes(pair)
    return pairs


def pair_named(names: Iterable[str], base: Path, tuned: Path) -> dict[str, TensorPair]:
    """Pairs some tensors of the tuned checkpoint with the base's, by their name in the tuned checkpoint.

    Args:
        names: Names of tensors of the tuned checkpoint.
        base: The base's folder.
        tuned: The folder of the checkpoint tuned from it. The two may be sharded differently.

    Raises:
        MaskMismatchError: A tensor is not in the base, or differs in dtype or shape.
        ModelError: One of the checkpoints cannot be read.
    """
    base_index, tuned_index = tensor_index(base), tensor_index(tuned)
    return {name: _paired(name, base_index, tuned_index, base, tuned) for name in names}


def is_embedding(name: str) -> bool:
    """True if a tensor holds the input embeddings, or learned positions."""
    return _EMBEDDINGS.search(name) is not None or _POSITIONS.search(name) is not None


def is_head(name: str) -> bool:
    """True if a tensor belongs to the output head."""
    return _HEADS.search(name) is not None


def same_weights(base: Path, tuned: Path, what: str = "reset") -> MaskMismatchError:
    """The error if no tensor of a pair of checkpoints that a delta mask covers differs.

    Args:
        base: The base's folder.
        tuned: The folder of the tuned checkpoint.
        what: What there is nothing to do with.
    """
    return MaskMismatchError(
        f"The base and the tuned checkpoint have the same weights, so there is nothing to {what}.",
        path=tuned,
        expected=f"weights that differ from those in {base}",
        hint="give the checkpoint from before fine-tuning as the base",
    )


def _paired(
    name: str, base_index: Mapping[str, StoredTensor], tuned_index: Mapping[str, StoredTensor], base: Path, tuned: Path
) -> TensorPair:
    mine, theirs = counterpart(name, base_index), counterpart(name, tuned_index)
    if mine is None or theirs is None or _form(mine) != _form(theirs):
        raise MaskMismatchError(
            "The base and the tuned checkpoint do not have the same tensors.",
            path=tuned,
            key=name,
            expected=f"{_form(mine)}, as in the base {base}",
            actual=_form(theirs),
            hint="give the checkpoint that the tuned one was trained from, saved in the same dtype",
        )
    return TensorPair(name, mine, theirs)


def _require_tied_head(
    base_index: Mapping[str, StoredTensor], tuned_index: Mapping[str, StoredTensor], base: Path, tuned: Path
) -> None:
    if HEAD in base_index and HEAD not in tuned_index and not _is_tied(base_index):
        raise MaskMismatchError(
            "The base has a separate output head, but the tuned checkpoint ties its head to its embeddings.",
            path=tuned,
            key=HEAD,
            expected=f"stored, as in the base {base}",
            actual="not stored",
            hint="give the checkpoint that the tuned one was trained from",
        )


def _require_same_bytes(pair: TensorPair) -> None:
    if tensor_digest(pair.base) != tensor_digest(pair.tuned):
        raise MaskMismatchError(
            "A tensor that no mask can describe differs between the base and the tuned checkpoint.",
            path=pair.tuned.path,
            key=pair.name,
            expected="the base's bytes, or a floating-point dtype and a shape of 1 to 8 dimensions",
            actual=_form(pair.tuned),
            hint="give checkpoints that are not quantised",
        )


def _is_tied(index: Mapping[str, StoredTensor]) -> bool:
    """True if the output head equals the input embeddings: it is not stored, or stored as a copy of them."""
    embeddings, head = _embeddings(index), index.get(HEAD)
    if embeddings is None or head is None:
        return embeddings is not None
    return _form(head) == _form(embeddings) and tensor_digest(head) == tensor_digest(embeddings)


def _embeddings(index: Mapping[str, StoredTensor]) -> StoredTensor | None:
    found = [stored for name, stored in index.items() if _EMBEDDINGS.search(name)]
    return found[0] if len(found) == 1 else None


def _is_maskable(stored: StoredTensor) -> bool:
    return stored.dtype in TORCH_DTYPES and 1 <= len(stored.shape) <= MAX_DIMENSIONS and 0 not in stored.shape


def _form(stored: StoredTensor | None) -> str:
    return "no such tensor" if stored is None else f"{stored.dtype} {stored.shape}"
