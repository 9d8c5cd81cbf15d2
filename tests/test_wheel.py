"""The wheel, built from what a container build sees, ships the recipes, the built-in model and its data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LOOK = """
from pathlib import Path
import mftctl
from mftctl.data.quickstart.built_in import data_path, model_path
from mftctl.experiments.recipe_files import built_in_names, find_recipe, load_recipe
home = Path(mftctl.__file__).parent
assert all(home in path.parents for path in (find_recipe("quickstart"), data_path("test"), model_path()))
assert (model_path() / "model.safetensors").is_file()
assert load_recipe("quickstart").stages
print(home, *built_in_names())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, context = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("context")
    for pattern in re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, context / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, context)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=context,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("mftctl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_recipes_model_and_data_are_found_in_any_folder(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    home, *recipes = done.stdout.split()
    assert Path(home) == installed / "mftctl"
    assert recipes == sorted(
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in (ROOT / "recipes").rglob("*.yaml")
        if not path.name.startswith("_") and path.parent.name != "accelerate"
    )
    assert (installed / "mftctl" / "recipes" / "_mft.yaml").is_file()
    assert (installed / "mftctl" / "recipes" / "accelerate" / "ddp.yaml").is_file()


def test_nothing_else_is_shipped(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert {name.partition("-")[0] for name in top} == {"mftctl"}
    assert (installed / "mftctl" / "py.typed").is_file()


def test_the_container_installs_the_tested_versions() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "-c /opt/src/constraints.txt /opt/src" in lines
    assert (ROOT / "constraints.txt").is_file()
    assert "!constraints.txt" in (ROOT / ".dockerignore").read_text().splitlines()
    guide = (ROOT / "docs/guides/install.md").read_text()
    for command in re.findall(r"^#   (docker .+)$", lines, re.MULTILINE):
        assert all(part in guide for part in command.split(" && "))
