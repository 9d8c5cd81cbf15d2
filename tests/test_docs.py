"""Documentation: every command parses, every link has a target, generated pages are up to date, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from mftctl.cli.app import build_app, load_command
from mftctl.experiments.recipe_files import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "recipes/README.md")),
    ]
)
README_BYTES = 10_000
PLACEHOLDERS = {"RECIPE", "NAME", "recipe.yaml"}
"""What stands for the name of a recipe."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: Path) -> list[str]:
    found = [line for block in blocks(page, "console", "shell") for line in re.findall(r"mftctl ([a-z].*)", block)]
    return [*found, *re.findall(r"^\| .*\| `mftctl (run .+?)` \|$", text_of(page), re.MULTILINE)]


def inline(page: Path) -> str:
    """The text without its code blocks and with its lines joined, to find inline code that spans two lines."""
    return " ".join(re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL).split())


def options(page: Path) -> list[tuple[str, str]]:
    """Pairs of command and option that the text names, such as `fft --low-memory`."""
    known = "fft|mask-train|probe|apply|average|interpolate|delta merge|delta export|delta import|delta|eval|generate"
    known += "|report|run|validate|env"
    found = re.findall(rf"`(?:mftctl )?({known}) ([^`]*--[^`]*)`", inline(page))
    return [(command, option) for command, text in found for option in re.findall(r"--[a-z][a-z-]*", text)]


def recipes(page: Path) -> list[str]:
    """The recipes that the page runs or validates."""
    lines = [*commands(page), *re.findall(r"`mftctl ((?:run|validate) [^`]+)`", inline(page))]
    names = [re.match(r"(?:run|validate) ([^-\s`]\S*)", line) for line in lines]
    return sorted({found[1] for found in names if found} - PLACEHOLDERS)


def anchors(page: Path) -> set[str]:
    """The heading anchors that GitHub generates."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.add(f"{slug}-{repeated}" if repeated else slug)
    return found


def links(page: Path) -> list[str]:
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(page), flags=re.DOTALL)
    return re.findall(r"\]\(([^()\s]+)\)", without_code)


def parse(line: str) -> None:
    """Parses a command line, values included, without running it; fails if mftctl does not accept it."""
    command: Any = get_command(build_app())
    words = shlex.split(line, comments=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MFTCTL_CACHE", os.environ["MFTCTL_CACHE"])  # which --no-cache changes
        context = command.make_context("mftctl", list(words))
        while hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(context, words)
            context = command.make_context(name, list(words), parent=context)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_is_understood(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["fft --no-such-option", "fft --epochs many", "mask info", "no-such-command"])
def test_a_wrong_command_is_not_understood(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid number|missing"):
        parse(line)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), sorted({pair for page in PAGES for pair in options(page)}))
def test_an_option_is_known(command: str, option: str) -> None:
    known = {flag for one in load_command(command).params for flag in (*one.opts, *one.secondary_opts)}
    assert option in known | {"--help"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for page in PAGES for name in recipes(page)}))
def test_a_recipe_is_built_in(name: str) -> None:
    assert load_recipe(name).stages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_have_targets(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{link}: no such file"
        assert file.is_relative_to(ROOT), f"{link}: outside of the repository"
        assert not anchor or anchor in anchors(file), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    for name in re.findall(r"`((?:mftctl|scripts|tests|recipes|docs|\.github|\.ci)/[\w./-]*)`", text_of(page)):
        assert (ROOT / name).exists(), f"{name}: no such file"
    for module in re.findall(r"python -m (tests\.[\w.]*\w)\b", text_of(page)):
        assert module == "tests.benchmarks.NAME" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        new |= {target for target in targets if target.suffix == ".md" and target.is_file()} - reached
    assert set(PAGES) - reached <= {ROOT / "docs" / "index.md"}


@pytest.mark.parametrize("name", ["command-line.md", "recipe-keys.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = text_of(ROOT / "docs" / "reference" / name)
    assert written == script("generate_reference").PAGES[name](), "run python scripts/generate_reference.py"


def test_pages_are_plain_markdown() -> None:
    """No plug-in syntax, which GitHub would show verbatim."""
    for page in PAGES:
        assert not re.search(r"^(!!!|\?\?\?|=== |:::|\{%|--8<--)", text_of(page), re.MULTILINE), name_of(page)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "guides" / "own-model" / "index.html").is_file()
