"""Finds a sandbox that works on this machine, by trying to break out of each candidate."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from mftctl.errors import SandboxError
from mftctl.evaluation.sandbox.kinds import Sandbox, candidates
from mftctl.evaluation.sandbox.program import Limits, Program
from mftctl.evaluation.sandbox.python_files import find_installation
from mftctl.evaluation.sandbox.supervise import judge_program

_SECRET = "the secret of the sandbox check"
_HINT = "install bubblewrap, or pass --unsafe-code to run model-written code with your own rights"


def find_sandbox(*, unsafe: bool = False) -> Sandbox:
    """The best sandbox that works on this machine; checked once per process.

    Args:
        unsafe: Whether code may run with the user's own rights, limited but not confined.

    Returns:
        A sandbox of kind `bubblewrap` or `landlock`; of kind `none` only if `unsafe`.

    Raises:
        SandboxError: No sandbox works and `unsafe` is false; the error states what was tried and why it failed. Or
            this is not Linux, which is needed to supervise even unconfined code.
    """
    if sys.platform != "linux":
        raise SandboxError("Model-written code can be run on Linux only.", expected="linux", actual=sys.platform)
    return Sandbox("none", find_installation()) if unsafe else _holding_sandbox()


@cache
def _holding_sandbox() -> Sandbox:
    failures: list[str] = []
    for sandbox in candidates(find_installation()):
        leak = why_it_leaks(sandbox)
        if leak is None:
            return replace(sandbox, passed_over="; ".join(failures)) if failures else sandbox
        failures.append(f"{sandbox.kind} does not work here ({leak})")
    raise SandboxError(
        "Model-written code cannot be confined on this machine.",
        expected="bubblewrap, or Landlock with seccomp (Linux on x86_64 or aarch64)",
        actual="; ".join(failures),
        hint=_HINT,
    )


def why_it_leaks(sandbox: Sandbox) -> str | None:
    """What a hostile program could do in a sandbox, or why no program runs in it; None if the sandbox works."""
    source = files("mftctl.evaluation.sandbox").joinpath("child", "escape_attempts.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="mftctl-probe-") as folder:
        secret, target = Path(folder) / "secret", Path(folder) / "target"
        secret.write_text(_SECRET, encoding="utf-8")
        target.write_text("untouched", encoding="utf-8")
        call = f"what_is_open({str(secret)!r}, {str(target)!r}, {folder!r}, {os.getpid()}, {sorted(os.environ)!r})"
        test = f"found = {call}\nassert found == [], 'open: ' + ', '.join(found)\nassert harmless(20) == 210"
        try:
            verdict = judge_program(sandbox, Program(source, test), Limits(), threading.Event())
        except SandboxError as error:
            return str(error.actual)
        leaks = [] if verdict.passed else [f"{verdict.outcome}: {verdict.detail}"]
        if target.read_text(encoding="utf-8") != "untouched" or len(list(Path(folder).iterdir())) != 2:
            leaks.append("a file outside the sandbox was written")
    return "; ".join(leaks) or None
