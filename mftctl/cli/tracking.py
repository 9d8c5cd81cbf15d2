"""The trackers of a command, and those that are installed."""

from __future__ import annotations

from collections.abc import Sequence

from mftctl.experiments.tracking.names import DISTRIBUTIONS, TrackerName, installed_version, missing_text, wanted
from mftctl.progress import Listener


def warn_of_missing(track: Sequence[TrackerName], console: Listener) -> None:
    """Warns of trackers that are not installed, before the training that goes on without them.

    Args:
        track: The recipe key `track`.
        console: Receives one line for each.
    """
    for name in wanted(track):
        if installed_version(name) is None:
            console.warn(missing_text(name))


def trackers_text() -> str:
    """Returns all trackers with their versions, or that they are not installed."""
    versions = {name: installed_version(name) for name in DISTRIBUTIONS}
    return ", ".join(f"{name} {found}" if found else f"{name} not installed" for name, found in versions.items())
