"""Where a model comes from, as its own folder tells: the runs folder that made it may be elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mftctl.files.ownership import MARKER, read_origin

_TRACES: Final = (MARKER, "adapter_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt")
"""Files that a training leaves, and no pre-trained model has."""


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """How a model was made, in its folder's `mftctl.json`.

    Attributes:
        state: What it is in the words of the papers, such as FFT.
        base: The model that it was made from: an absolute path, a hub id or `quickstart`.
        origin: The model that the first training on the way here started from, likewise.
        digest: Of the base, as `model_fingerprint` has it; empty for a hub id or the built-in model.
    """

    state: str
    base: str
    origin: str
    digest: str

    def as_document(self) -> dict[str, str]:
        """The same as plain data."""
        return asdict(self)


def origin_of(state: str, base: str, origin: str) -> ModelOrigin:
    """The origin of a model that is about to be written.

    Args:
        state: What it is.
        base: The model that it is made from.
        origin: The model that all began with; the base itself where empty.
    """
    from mftctl.experiments.fingerprints import model_fingerprint

    return ModelOrigin(state, _absolute(base), _absolute(origin or base), model_fingerprint(base) or "")


def told_origin(folder: Path) -> ModelOrigin | None:
    """What a folder tells of its model; None if nothing."""
    found: Mapping[str, object] = read_origin(folder) or {}
    texts = {key: value for key, value in found.items() if isinstance(value, str)}
    try:
        return ModelOrigin(**texts)
    except TypeError:
        return None


def was_trained(folder: Path) -> bool:
    """Whether something in a folder shows that its model was trained, by whatever tool."""
    return any((folder / name).is_file() for name in _TRACES)


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
