"""Every command that writes, with random output paths in a tree of user files: none of those files changes."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mftctl.experiments.run_folder import list_runs
from tests.cli.running import CommandLine
from tests.workflow_fixtures import make_workspace

STEPS = ["--max-steps", "1", "--val-steps", "1", "--batch-size", "4"]
TRAIN = ["-d", "train.jsonl", "--val-data", "val.jsonl"]
WRITERS: dict[str, list[str]] = {
    "fft": ["fft", "-m", "tiny", *TRAIN, *STEPS],
    "mask-train": ["mask-train", "-m", "tiny", *TRAIN, "--method", "magnitude", "--layers", "1"],
    "apply": ["apply", "tiny", "given.bits"],
    "average": ["average", "tiny", "tiny"],
    "import": ["mask", "import", "given.npz", "-m", "tiny"],
    "export": ["mask", "export", "given.bits"],
    "report": ["report"],
    "run": ["run", "recipe.yaml"],
}
OWN = {
    "fft": ["made"],
    "apply": ["made"],
    "average": ["made"],
    "mask-train": ["old.bits", "given.bits"],
    "import": ["old.bits", "given.bits"],
    "export": ["old.bits", "given.npz"],
    "report": ["reported"],
    "run": ["reported"],
}
"""Results that a command may replace, by its name: all else is the user's."""

PARTS = [
    *("", ".", "..", "new", "user", "USER", "notes.txt", ".git", "tiny", "given.bits", "given.npz", "train.jsonl"),
    *("recipe.yaml", "runs", "001-mask-train", "made", "old.bits", "reported", "index.html", "figures", "model"),
    *("to-user", "to-notes", "to-nothing", "circle", "hard", "x.pt", "x.bits"),
]
OUTPUTS = st.builds(
    lambda start, parts, end: start + "/".join(parts) + end,
    st.sampled_from(["", "", "./", "TREE/"]),  # no "/", which may be the machine's own root
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3),
    st.sampled_from(["", "", "/", "/."]),
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, masks, mftctl results and user files."""
    with pytest.MonkeyPatch.context() as patch:
        folder = make_workspace(tmp_path_factory.mktemp("template") / "tree")

        def mftctl(*arguments: str) -> None:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["mftctl", *arguments])
            from mftctl.cli.app import main

            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code in (0, None)

        mftctl(*WRITERS["mask-train"], "-o", "given.bits")
        mftctl(*WRITERS["apply"], "-o", "made")
        mftctl("mask", "export", "given.bits", "-o", "given.npz")
        mftctl("mask", "export", "given.bits", "-o", "old.bits", "--codec", "packed")
        mftctl("eval", "made", "-d", "val.jsonl", "--no-generate")
        mftctl("report", "-o", "reported")
    recipe = {"model": "tiny", "data": "train.jsonl", "val_data": "val.jsonl", "test_data": "val.jsonl"}
    stages = {"pretrained": {"command": "eval", "set": {"eval.generate": False, "eval.limit": 2}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages}))
    user = folder / "user"
    for name in (".git/HEAD", "notes.txt", "sub/index.html", "figures/mine.png", "report.json"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(f"mine: {name}")
    for name in (f".notes.{os.uname().nodename}-99999.txt", ".mftctl-tmp-mine"):
        (folder / name).write_text("mine")
    for link, target in (("to-user", "user"), ("to-notes", "user/notes.txt"), ("to-nothing", "gone"), ("circle",) * 2):
        (folder / link).symlink_to(target)
    os.link(folder / "train.jsonl", folder / "hard")
    return folder


def state(folder: Path) -> dict[str, str | bytes]:
    """Link targets, file contents and folders."""
    found: dict[str, str | bytes] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            key = str(path.relative_to(folder))
            found[key] = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_bytes()
    return found


def lost(before: dict[str, str | bytes], after: dict[str, str | bytes], replaceable: list[str]) -> list[str]:
    """Paths that are missing or changed, except results that may be replaced."""
    return [
        name
        for name, content in before.items()
        if after.get(name) != content and Path(name).parts[0] not in replaceable and not name.endswith(".lock")
    ]


Run = Callable[[str, str, bool], None]


@pytest.fixture
def attempt(template: Path, mftctl: CommandLine) -> Run:
    """Runs a command with an output path in a fresh copy of the tree, and checks its effects."""

    def run(command: str, output: str, yes: bool) -> None:
        tree = mftctl.folder / "deep" / "in" / "a" / "tree"  # an output can be up to three folders above
        shutil.rmtree(mftctl.folder / "deep", ignore_errors=True)
        shutil.copytree(template, tree, symlinks=True)
        mftctl.folder, home = tree, mftctl.folder
        try:
            before, outside = state(tree), sorted(home.iterdir())
            has_yes = yes and command not in ("report", "run")
            place = output.replace("TREE", str(tree))
            outcome = mftctl(*WRITERS[command], "-o", place, *(["--yes"] if has_yes else []))
            assert "Traceback" not in outcome.stderr
            assert outcome.code in (0, 1, 2), outcome.stderr
            may_be_replaced = OWN[command] if has_yes or command in ("report", "run") else []
            after = state(tree)
            assert lost(before, after, may_be_replaced) == [], (output, outcome.stderr)
            assert not [name for name in after if ".mftctl-tmp-" in name and name not in before], output
            assert set(outside) <= set(home.iterdir())
            if outcome.code == 2:
                assert len(list_runs(tree / "runs")[0]) == 3, (output, outcome.stderr)  # refused before any work
        finally:
            mftctl.folder = home

    return run


FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = settings(FEW, max_examples=40)


OFTEN = ("", ".", "user", "to-user", "made", "old.bits", "hard", "runs/001-mask-train")
SOMETIMES = (".", "tiny", "train.jsonl", "user", "made")


def always(*outputs: str) -> Callable[[Any], Any]:
    """Tries these outputs besides random ones."""
    return lambda test: functools.reduce(lambda of, output: example(output=output, yes=True)(of), outputs, test)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["apply", "average", "mask-train", "import", "export"])
@MANY
@always(*OFTEN)
@given(output=OUTPUTS, yes=st.booleans())
def test_nothing_of_the_users_changes(attempt: Run, command: str, output: str, yes: bool) -> None:
    attempt(command, output, yes)


@pytest.mark.slow
@FEW
@always(*OFTEN)
@given(output=OUTPUTS, yes=st.booleans())
def test_nothing_of_the_users_changes_after_a_report(attempt: Run, output: str, yes: bool) -> None:
    attempt("report", output, yes)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "run"])
@FEW
@always(*SOMETIMES)
@given(output=OUTPUTS, yes=st.booleans())
def test_nothing_of_the_users_changes_after_a_training(attempt: Run, command: str, output: str, yes: bool) -> None:
    attempt(command, output, yes)
