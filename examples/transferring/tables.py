"""The tables of the study: the paper's Tables 9 and 5 in miniature, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from statistics import mean
from typing import Any

from peft_svf.trainers.statistics import bootstrap_interval
from transferring.cells import Cell, Cells
from transferring.study import BASE, FEW_SHOT, FEW_SHOT_SHUFFLED, METHODS, ORDERED


CONTRASTS = {  # what order is worth: the same offsets, in and out of it
    "ordered − shuffled": (ORDERED, "shuffled"),
    "ordered − reversed": (ORDERED, "reversed"),
    "ordered − random": (ORDERED, "random"),
    "few-shot, ordered − shuffled": (FEW_SHOT, FEW_SHOT_SHUFFLED),
}
RESAMPLES = 2000  # of a bootstrap, of which a target takes a hundred
INTERVALS = "[95 % interval over seeds and prompts]"


def report(cells: Cells, targets: Sequence[str]) -> str:
    """Markdown for all targets."""
    return "\n".join(piece for target in targets for piece in _target(cells, target))


def results(cells: Cells, targets: Sequence[str]) -> dict[str, Any]:
    """The same numbers, of JSON types."""
    found: dict[str, Any] = {}
    for target in targets:
        found[target] = {task: _task_results(cells.of(target=target, task=task)) for task in _tasks(cells, target)}
    return found


def _target(cells: Cells, target: str) -> Iterator[str]:
    tasks = _tasks(cells, target)
    groups = {
        "Table 9 in miniature: the tasks that the experts were trained for": [t for t in tasks if "-hard" not in t],
        "Table 5 in miniature: harder variants, which no expert has seen": [t for t in tasks if "-hard" in t],
    }
    seconds = sum(cell.seconds for cell in cells.of(target=target))
    yield f"## {target}\n\nMeasured in {seconds:.0f} s, training of experts not counted.\n"
    for title, group in groups.items():
        if group:
            yield f"### {title}\n"
            yield _table(cells, target, group)


def _table(cells: Cells, target: str, tasks: list[str]) -> str:
    columns = {task: cells.of(target=target, task=task) for task in tasks}
    known = [method for method in METHODS if any(_rows(own, method) for own in columns.values())]
    prompts = len(next(iter(columns.values()))[0].successes)
    names = [task.removeprefix("playground-") for task in tasks]
    lines = [
        f"Greedy success in %, {prompts} prompts; below, differences in points {INTERVALS}",
        "",
        f"| | seeds | {' | '.join(names)} |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for method in known:
        count = max(len(_rows(own, method)) for own in columns.values())
        shown = [_percent(_rows(own, method)) for own in columns.values()]
        lines.append(f"| {method} | {count} | {' | '.join(shown)} |")
    for method in known[1:]:
        shown = [_percent(_difference(own, method, BASE), "+") for own in columns.values()]
        lines.append(f"| {method} − base | | {' | '.join(shown)} |")
    for name, (one, other) in CONTRASTS.items():
        differences = [_difference(own, one, other) for own in columns.values()]
        if any(differences):
            lines.append(f"| {name} | | {' | '.join(_percent(rows, '+') for rows in differences)} |")
    return "\n".join([*lines, ""])


def _task_results(cells: list[Cell]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in METHODS:
        if rows := _rows(cells, method):
            own = [cell for cell in cells if cell.method == method]
            found[method] = {
                "success": _interval(rows),
                "minus_base": None if method == BASE else _interval(_difference(cells, method, BASE)),
                "by_seed": [mean(cell.successes) for cell in own],
                "details": [dict(cell.details) for cell in own if cell.details],
            }
    contrasts = {name: _difference(cells, *pair) for name, pair in CONTRASTS.items()}
    return {"methods": found, "contrasts": {name: _interval(rows) for name, rows in contrasts.items() if rows}}


def _rows(cells: list[Cell], method: str) -> list[list[float]]:
    """A row of verdicts for each seed and draw, shape (seeds · draws, prompts)."""
    own = sorted((cell for cell in cells if cell.method == method), key=lambda cell: (cell.seed, cell.draw))
    return [[float(success) for success in cell.successes] for cell in own]


def _difference(cells: list[Cell], one: str, other: str) -> list[list[float]]:
    """Prompt by prompt, for every seed the mean of its draws; against the base model, which has one row, that row."""
    first, second = _by_seed(cells, one), _by_seed(cells, other)
    if other == BASE and second:
        second = dict.fromkeys(first, next(iter(second.values())))
    return [[a - b for a, b in zip(row, second[seed], strict=True)] for seed, row in first.items() if seed in second]


def _by_seed(cells: list[Cell], method: str) -> dict[int, list[float]]:
    """The mean over draws, prompt by prompt."""
    own = [cell for cell in cells if cell.method == method]
    return {
        seed: [mean(values) for values in zip(*(c.successes for c in own if c.seed == seed), strict=True)]
        for seed in sorted({cell.seed for cell in own})
    }


def _tasks(cells: Cells, target: str) -> list[str]:
    return list(dict.fromkeys(cell.task for cell in cells.of(target=target)))


def _interval(rows: list[list[float]]) -> dict[str, float]:
    center, low, high = _bootstrap(tuple(map(tuple, rows)))
    return {"mean": center, "low": low, "high": high}


def _percent(rows: list[list[float]], sign: str = "") -> str:
    if not rows:
        return "–"
    center, low, high = _bootstrap(tuple(map(tuple, rows)))
    return f"{100 * center:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


@cache
def _bootstrap(rows: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    return bootstrap_interval(rows, RESAMPLES)
