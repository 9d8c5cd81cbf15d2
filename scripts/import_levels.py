"""Prints the levels of imports between the packages of mftctl and between its modules; fails on an import upwards.

    python scripts/import_levels.py

An import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mftctl"
LEVELS = (
    ("errors", "progress", "text"),
    ("files",),
    ("runtime",),
    ("data",),
    ("masking",),
    ("experiments",),
    ("evaluation",),
    ("training",),
    ("reporting", "workflows"),
    ("api",),
    ("cli",),
)
"""The parts of mftctl from the lowest to the highest; a part imports itself and lower ones only."""


def module_imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports.

    Args:
        package: Its folder.
    """
    files = {_module_name(file, package): file for file in package.rglob("*.py")}
    return {name: set(_imported(ast.parse(file.read_text("utf-8")), files)) - {name} for name, file in files.items()}


def levels(imports: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The modules by level; those of a level import lower levels only.

    Raises:
        graphlib.CycleError: Modules import each other.
    """
    sorter = TopologicalSorter(imports)
    sorter.prepare()
    found = []
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def imports_upwards(imports: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """The pairs of importing and imported module that go against `LEVELS`."""
    height = {part: level for level, parts in enumerate(LEVELS) for part in parts}
    return sorted(
        (importer, imported)
        for importer, found in imports.items()
        for imported in found
        if _part(importer) in height
        and _part(imported) in height
        and _part(importer) != _part(imported)
        and height[_part(importer)] <= height[_part(imported)]
    )


def _module_name(file: Path, package: Path) -> str:
    return ".".join((package.name, *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")


def _imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from {name if name in modules else node.module} & modules.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules.keys()


def _part(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def main() -> int:
    """The exit code: 1 where an import goes upwards or modules import each other."""
    imports = module_imports()
    for level, parts in enumerate(LEVELS):
        sizes = [f"{part} ({sum(_part(module) == part for module in imports)})" for part in parts]
        print(f"{level}  {', '.join(sizes)}")
    upwards = imports_upwards(imports)
    for importer, imported in upwards:
        print(f"upwards: {importer} imports {imported}")
    try:
        print(f"{len(imports)} modules on {len(levels(imports))} levels, no circle")
    except CycleError as error:
        print(f"circle: {' -> '.join(error.args[1])}")
        return 1
    return 1 if upwards else 0


if __name__ == "__main__":
    sys.exit(main())
