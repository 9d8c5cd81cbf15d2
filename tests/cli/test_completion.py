"""Completion as a shell asks for it, in bash and in zsh where it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BASH = """
eval "$(_MFTCTL_COMPLETE=source_bash mftctl)"
COMP_WORDS=({words})
COMP_CWORD={last}
_mftctl_completion mftctl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ :; }}
_arguments() {{ print -r -- "$@"; }}
_files() {{ :; }}
eval "$(_MFTCTL_COMPLETE=source_zsh mftctl)"
words=({words})
CURRENT={current}
_mftctl_completion
"""


def offered(folder: Path, shell: str, *words: str) -> list[str]:
    """What the shell offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = (BASH if shell == "bash" else ZSH).format(words=quoted, last=len(words) - 1, current=len(words))
    flags = ["--norc", "--noprofile"] if shell == "bash" else ["-f"]
    done = subprocess.run(
        [shell, *flags, "-c", script],
        cwd=folder,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    if shell == "zsh":
        return re.findall(r'"([^"]+)"(?::"[^"]*")?', done.stdout)
    return done.stdout.split("\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a finished probe."""
    found = tmp_path_factory.mktemp("shell")
    (found / "mine.yaml").write_text("fft: {epochs: 1}\n")
    run = found / "runs" / "004-probe"
    run.mkdir(parents=True)
    groups = [
        {"layers": layers, "size": 4, "change": change, "start_loss": 1.0, "best_loss": 0.9, "best_step": 1, "steps": 2}
        for layers, change in (("4-7", -0.1), ("0-3", 0.1))
    ]
    result = {"groups": groups, "recommended_layers": "4-7", "unmasked_loss": 1.0}
    record = {"command": "probe", "status": "finished", "started": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
    (run / "run.json").write_text(json.dumps({**record, "result": result, "config": {}, "inputs": {}, "versions": {}}))
    return found


SHELLS = ["bash", pytest.param("zsh", marks=pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed"))]
CASES = {
    "commands": (("mftctl", "mask-t"), "mask-train"),
    "options": (("mftctl", "fft", "--learn-f"), "--learn-from"),
    "choices": (("mftctl", "fft", "--method", "gm"), "gmt"),
    "recipes": (("mftctl", "run", "quickstart/st"), "quickstart/strong"),
    "recipe files": (("mftctl", "run", "mi"), "mine.yaml"),
    "recipes of a command": (("mftctl", "fft", "-r", "smollm2/g"), "smollm2/gsm8k"),
    "runs": (("mftctl", "report", "00"), "004-probe"),
    "recipe keys": (("mftctl", "fft", "--set", "fft.learning"), "fft.learning_rate="),
    "layers": (("mftctl", "mask-train", "--layers", ""), "4-7"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("case", CASES)
def test_the_shell_offers(folder: Path, shell: str, case: str) -> None:
    words, expected = CASES[case]
    found = offered(folder, shell, *words)
    assert expected in found
    assert all(text.startswith(words[-1]) for text in found if text)


@pytest.mark.slow
def test_a_damaged_runs_folder_offers_only_all_layers(tmp_path: Path) -> None:
    (tmp_path / "runs" / "001-probe").mkdir(parents=True)
    (tmp_path / "runs" / "001-probe" / "run.json").write_text("{")
    assert offered(tmp_path, "bash", "mftctl", "mask-train", "--layers", "")[0] == "all"
