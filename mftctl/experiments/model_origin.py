"""The origin of a model as recorded in its own folder, independent of the runs folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mftctl.files.ownership import MARKER, read_origin

_TRACES: Final = (MARKER, "adapter_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt")
"""Files left by training that no pre-trained model has."""


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """Origin of a model, as stored in its folder's `mftctl.json`.

    Attributes:
        state: Label of its state, as in the papers, such as FFT.
        base: The model that it was made from: an absolute path, a hub id or `quickstart`.
        origin: The model that the first training started from, in the same form.
        digest: The `model_fingerprint` of the base; empty for a hub id or the built-in model.
    """

    state: str
    base: str
    origin: str
    digest: str

    def as_document(self) -> dict[str, str]:
        """Returns the origin as plain data."""
        return asdict(self)


def origin_of(state: str, base: str, origin: str) -> ModelOrigin:
    """Returns the origin of a model that is about to be written.

    Args:
        state: Its state.
        base: The model that it is made from.
        origin: The model that the first training started from; empty for the base itself.
    """
    from mftctl.experiments.fingerprints import model_fingerprint

    return ModelOrigin(state, _absolute(base), _absolute(origin or base), model_fingerprint(base) or "")


def told_origin(folder: Path) -> ModelOrigin | None:
    """Returns the origin recorded in a model folder, or None."""
    found: Mapping[str, object] = read_origin(folder) or {}
    texts = {key: value for key, value in found.items() if isinstance(value, str)}
    try:
        return ModelOrigin(**texts)
    except TypeError:
        return None


def was_trained(folder: Path) -> bool:
    """Checks whether files in a folder show that its model was trained, by any tool."""
    return any((folder / name).is_file() for name in _TRACES)


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
