"""The state of an experiment as a tree: each stage below the one it builds on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.tree import Tree

from mftctl.experiments.jobs import Job
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
    """Returns a tree of all seeds of an experiment with their jobs."""
    done = sum(planned.state == "done" for planned in plan)
    tree = Tree(f"[bold]{escape(name)}[/]  {done} of {len(plan)} done", guide_style="dim")
    for seed in dict.fromkeys(planned.job.seed for planned in plan):
        _add_seed(tree, seed, [planned for planned in plan if planned.job.seed == seed])
    return tree


def running_tree(name: str, plan: Sequence[Planned]) -> Tree:
    """Returns a tree of the running seed with its jobs, and one line for each other seed."""
    done = sum(planned.state == "done" for planned in plan)
    tree = Tree(f"[bold]{escape(name)}[/]  {done} of {len(plan)} done", guide_style="dim")
    by_seed: dict[int, list[Planned]] = {}
    for planned in plan:
        by_seed.setdefault(planned.job.seed, []).append(planned)
    for seed, jobs in by_seed.items():
        if any(planned.state == "running" for planned in jobs):
            _add_seed(tree, seed, jobs)
        else:
            finished = sum(planned.state == "done" for planned in jobs)
            tree.add(f"seed {seed}  {finished} of {len(jobs)} done", style="dim")
    return tree


def _add_seed(tree: Tree, seed: int, jobs: Sequence[Planned]) -> None:
    branch = tree.add(f"seed {seed}")
    nodes: dict[int, Tree] = {}
    for planned in jobs:
        job = planned.job
        before = job.candidates[0].after if job.candidates else job.after  # which candidate it is will be known later
        parent = branch if before is None else nodes[id(before)]
        nodes[id(planned.job)] = parent.add(_line(planned))


def _line(planned: Planned) -> str:
    job = planned.job
    text = f"{_MARKS[planned.state]} {escape(_title(job))}"
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


def _title(job: Job) -> str:
    if job.candidates:
        return f"{job.name} of {job.label} ({job.command})"
    probe = f", layers from {job.layers_from.name}" if job.layers_from else ""
    named = "" if job.name.partition("[")[0] == job.command else f" ({job.command}{probe})"
    return f"{job.name}{named}"
