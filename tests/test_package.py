"""Package-wide properties: public names, and which modules are imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError
from pathlib import Path

import pytest

import mftctl
from scripts.import_levels import LEVELS, imports_upwards, levels, module_imports

PACKAGE = Path(mftctl.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
HEAVY = ("torch", "transformers", "datasets", "accelerate", "safetensors", "lm_eval", "scipy")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in a file; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(*packages: str) -> set[str]:
    """Package files that import one of these packages."""
    return {
        file
        for file, tree in MODULES.items()
        if any(f"{name}.".startswith(f"{package}.") for name in imports(tree) for package in packages)
    }


def loaded_after(code: str) -> set[str]:
    """Heavy libraries loaded in a fresh interpreter after running the code."""
    report = f"\nprint('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_public_names_resolve() -> None:
    commands = {"Finished", "Recipe", "evaluate", "fine_tune", "learn_mask", "load_recipe"}
    masks = {"Mask", "load_mask", "save_mask", "apply_mask", "attach_masks", "collect_mask", "detach_masks"}
    assert {*commands, *masks, "__version__"} == set(mftctl.__all__)
    from mftctl.masking.checkpoints.apply_in_memory import apply_mask
    from mftctl.masking.mask import Mask, load_mask, save_mask

    assert mftctl.Mask is Mask
    assert mftctl.load_mask is load_mask
    assert mftctl.save_mask is save_mask
    assert mftctl.apply_mask is apply_mask
    assert set(mftctl.__all__) <= set(dir(mftctl))
    assert all(getattr(mftctl, name) is not None for name in mftctl.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mftctl' has no attribute 'load_masks'"):
        mftctl.load_masks  # noqa: B018 - the access is the test


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import mftctl") == set()
    assert "torch" in loaded_after("from mftctl import load_mask")


@pytest.mark.slow
def test_training_loads_no_benchmarks() -> None:
    assert "lm_eval" not in loaded_after(
        "import mftctl.workflows.probe, mftctl.workflows.run, mftctl.workflows.validate"
    )


@pytest.mark.slow
def test_help_loads_nothing_heavy() -> None:
    code = """
import contextlib, io, runpy
sys.argv = ["mftctl", "--help"]
shown = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
    runpy.run_module("mftctl", run_name="__main__")
assert "mask-train" in shown.getvalue()
"""
    assert loaded_after(code) == set()


@pytest.mark.slow
def test_console_libraries_stay_in_the_command_line() -> None:
    outside = {file for file in importers("typer", "rich") if not file.startswith("cli/")}
    assert outside == set()
    assert "cli/app.py" in importers("typer")


@pytest.mark.slow
def test_click_is_never_imported() -> None:
    assert importers("click", "typer._click") == set()


@pytest.mark.slow
def test_imports_point_down_and_never_in_a_circle() -> None:
    imports = module_imports()
    assert {part for parts in LEVELS for part in parts} | {"__init__", "__main__", "py"} >= {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert imports_upwards(imports) == []
    assert len(levels(imports)) > len(LEVELS)


def test_an_import_upwards_and_a_circle_are_found(tmp_path: Path) -> None:
    for name, text in (("errors.py", "import mftctl.text"), ("text.py", "def f():\n    from mftctl import errors")):
        (tmp_path / "mftctl").mkdir(exist_ok=True)
        (tmp_path / "mftctl" / name).write_text(text)
    found = module_imports(tmp_path / "mftctl")
    assert imports_upwards(found) == [("mftctl.errors", "mftctl.text"), ("mftctl.text", "mftctl.errors")]
    with pytest.raises(CycleError):
        levels(found)


@pytest.mark.slow
def test_of_the_data_package_the_engine_imports_only_the_built_in_model() -> None:
    inside = {file for file in importers("mftctl.data") if file.startswith("masking/")}
    built_in = {file for file in importers("mftctl.data.quickstart.built_in") if file.startswith("masking/")}
    assert inside == built_in != set()


@pytest.mark.slow
def test_only_the_command_line_imports_the_command_line() -> None:
    outside = {file for file in importers("mftctl.cli") if not file.startswith("cli/")}
    assert outside == {"__main__.py"}


def undocumented(body: list[ast.stmt], place: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{place}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{place}.{node.name}")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(MODULES))
def test_every_public_name_is_documented(file: str) -> None:
    tree = MODULES[file]
    # __main__ is two lines and never imported.
    assert ast.get_docstring(tree) is not None
    assert list(undocumented(tree.body, file)) == []
