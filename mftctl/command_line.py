"""Commands as a user types them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def command_line(*words: str | Path, runs: Path | None = None) -> str:
    """A command quoted for the shell, with the runs folder where it is not the one that is used without being named.

    Args:
        words: Of the command line; a path that begins with a dash is told from an option.
        runs: The runs folder that the command works in; None for a command that uses none.
    """
    texts = [_told_from_option(word) if isinstance(word, Path) else word for word in words]
    if runs is not None and runs.absolute() != Path(os.environ.get("MFTCTL_RUNS") or "runs").absolute():
        texts += ["--runs", _told_from_option(runs)]
    return shlex.join(texts)


def _told_from_option(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)
