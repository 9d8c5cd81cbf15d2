"""A file to apply to a model, a mask or a delta file, for commands that take both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.masking.checkpoints.apply_in_memory import apply_mask, base_folder
from mftctl.masking.delta.apply import apply_delta
from mftctl.masking.delta.carried_files import beside
from mftctl.masking.delta.delta import Delta, is_delta_file, open_delta
from mftctl.masking.mask import Mask, open_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Applicable = Mask | Delta


@contextmanager
def open_applicable(path: Path | str | None) -> Iterator[Applicable | None]:
    """Opens a mask or a delta file without loading its bits.

    Args:
        path: A possibly untrusted file; None for none.

    Yields:
        The mask or the delta, valid until the block ends.

    Raises:
        MaskFormatError: The file cannot be read, is damaged, has an unknown version or is neither.
    """
    if path is None:
        yield None
    elif is_delta_file(path):
        with open_delta(path) as delta:
            yield delta
    else:
        with open_mask(path) as mask:
            yield mask


@contextmanager
def checkpoint_files(folder: Path, applied: Applicable | None) -> Iterator[Path]:
    """The folder to take configuration and tokenizer from: the checkpoint's, with the files of a delta in their place.

    Args:
        folder: A checkpoint.
        applied: What will be applied to it.

    Yields:
        A folder with the checkpoint's weights, valid until the block ends.

    Raises:
        MaskFormatError: A file in the delta is damaged.
    """
    if isinstance(applied, Delta):
        with beside(folder, applied) as changed:
            yield changed
    else:
        yield folder


def apply_in_memory(model: PreTrainedModel, applied: Applicable, checkpoint: Path) -> None:
    """Applies a mask or a delta to a loaded model, in place.

    Args:
        model: Loaded from the checkpoint.
        applied: The mask or the delta.
        checkpoint: The checkpoint's folder.

    Raises:
        MaskMismatchError: The model is not the one it was made for.
        MaskFormatError: Its contents violate the format.
        MaskingError: The model's storage layout cannot be determined.
        ModelError: A checkpoint cannot be read.
    """
    if isinstance(applied, Delta):
        apply_delta(model, applied, checkpoint)
    else:
        apply_mask(model, applied, base_folder(applied))
