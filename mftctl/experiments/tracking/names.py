"""The supported trackers, and which of them are installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Literal

from mftctl.progress import Listener

TrackerName = Literal["wandb", "tensorboard", "trackio", "mlflow", "none"]

DISTRIBUTIONS: Final = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
"""Tracker to the distributions that provide it."""


def installed_version(tracker: str) -> str | None:
    """Returns the version of a tracker without importing it; None if it is not installed."""
    for distribution in DISTRIBUTIONS[tracker]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def wanted(track: Iterable[TrackerName]) -> list[str]:
    """Returns the trackers to send to, installed or not.

    Args:
        track: The recipe key `track`.
    """
    return [name for name in track if name != "none"]


def missing_text(tracker: str) -> str:
    """Returns the warning for a tracker that is not installed."""
    return f"--track {tracker}: it is not installed, so nothing is sent to it; pip install 'mftctl[{tracker}]'"


def warn_of_missing(track: Sequence[TrackerName], listener: Listener) -> None:
    """Warns of trackers that are not installed, before the training that goes on without them.

    Args:
        track: The recipe key `track`.
        listener: Receives one line for each.
    """
    for name in wanted(track):
        if installed_version(name) is None:
            listener.warn(missing_text(name))


def trackers_text() -> str:
    """Returns all trackers with their versions, or that they are not installed."""
    versions = {name: installed_version(name) for name in DISTRIBUTIONS}
    return ", ".join(f"{name} {found}" if found else f"{name} not installed" for name, found in versions.items())
