"""The state of an experiment as a tree: each stage below the one it builds on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.tree import Tree

from mftctl.experiments.jobs import Task
from mftctl.workflows.run import Planned

_MARKS = {
    "done": "[green]✓[/]",
    "running": "[cyan]▸[/]",
    "elsewhere": "[dim]▸[/]",
    "failed": "[red]✗[/]",
    "resumed": "[yellow]↻[/]",
    "changed": "[yellow]○[/]",
    "new": "○",
}


def experiment_tree(name: str, plan: Sequence[Planned]) -> Tree:
    """Returns a tree of all seeds of an experiment with their tasks."""
    done = sum(planned.state == "done" for planned in plan)
    tree = Tree(f"[bold]{escape(name)}[/]  {done} of {len(plan)} done", guide_style="dim")
    for seed in dict.fromkeys(planned.task.seed for planned in plan):
        _add_seed(tree, seed, [planned for planned in plan if planned.task.seed == seed])
    return tree


def running_tree(name: str, plan: Sequence[Planned]) -> Tree:
    """Returns a tree of the running seed with its tasks, and one line for each other seed."""
    done = sum(planned.state == "done" for planned in plan)
    tree = Tree(f"[bold]{escape(name)}[/]  {done} of {len(plan)} done", guide_style="dim")
    by_seed: dict[int, list[Planned]] = {}
    for planned in plan:
        by_seed.setdefault(planned.task.seed, []).append(planned)
    for seed, tasks in by_seed.items():
        if any(planned.state == "running" for planned in tasks):
            _add_seed(tree, seed, tasks)
        else:
            finished = sum(planned.state == "done" for planned in tasks)
            tree.add(f"seed {seed}  {finished} of {len(tasks)} done", style="dim")
    return tree


def _add_seed(tree: Tree, seed: int, tasks: Sequence[Planned]) -> None:
    branch = tree.add(f"seed {seed}")
    nodes: dict[int, Tree] = {}
    for planned in tasks:
        parent = branch if planned.task.after is None else nodes[id(planned.task.after)]
        nodes[id(planned.task)] = parent.add(_line(planned))


def _line(planned: Planned) -> str:
    task = planned.task
    text = f"{_MARKS[planned.state]} {escape(_title(task))}"
    details = []
    if planned.state == "done" and planned.run is not None:
        details.append(f"{planned.run.name}, {planned.run.record.seconds:.0f} s")
    elif planned.state == "resumed" and planned.run is not None:
        details.append(f"{planned.run.record.status} before, resumes in {planned.run.name}")
    elif planned.state == "elsewhere" and planned.run is not None:
        details.append(f"{planned.run.name}, by {planned.run.record.worker}")
    elif planned.why:
        details.append(planned.why)
    return text + (f"  [dim]{escape('; '.join(details))}[/]" if details else "")


def _title(task: Task) -> str:
    probe = f", layers from {task.layers_from.name}" if task.layers_from else ""
    named = "" if task.name.partition("[")[0] == task.command else f" ({task.command}{probe})"
    return f"{task.name}{named}"
