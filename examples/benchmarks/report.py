"""What the benchmark prints: rows with goals and verdicts, as Markdown tables or JSON, and the hardware used."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from timing import Spread


COLUMNS = ("SVF", "LoRA r16", "IA3", "VeRA", "TinyLoRA", "U, S, V")


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        quantity (`str`): What was measured, with its unit and what 1 means.
        setting (`str`): Shape and dtype.
        values (`dict[str, Spread]`): By method, the names of the report's columns.
        at_most (`float`, *optional*): The goal for SVF; none for rows that only inform.
        at_least (`float`, *optional*): The goal if more is better; not both.
        why_missed (`str`): Printed if the goal is missed by every single measurement.
        note (`str`): Printed in any case.
    """

    quantity: str
    setting: str
    values: dict[str, Spread]
    at_most: float | None = None
    why_missed: str = ""
    note: str = ""
    at_least: float | None = None

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:.3g}"
        return "" if self.at_most is None else f"≤ {self.at_most:.3g}"

    @property
    def met(self) -> bool | None:
        return self._meets(self.values["SVF"].median)

    def _meets(self, value: float) -> bool | None:
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most

    def verdict(self) -> str:
        if self.met is None:
            return self.note
        if self.met:
            words = "met"
        elif self._meets(self.values["SVF"].low) or self._meets(self.values["SVF"].high):
            words = "missed by less than the measurements scatter"
        else:
            words = f"missed: {self.why_missed}" if self.why_missed else "missed"
        return f"{words}; {self.note}" if self.note else words


@dataclass
class Report:
    """The rows of one run, and the machine and versions they were measured with; `columns` name values of the rows."""

    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    columns: tuple[str, ...] = COLUMNS

    def markdown(self) -> str:
        """A line on the environment, then one table for each shape and dtype."""
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items()), ""]
        for setting in dict.fromkeys(row.setting for row in self.rows):
            lines += [f"**{setting}**", "", *self._table([row for row in self.rows if row.setting == setting]), ""]
        return "\n".join(lines)

    def _table(self, rows: Iterable[Row]) -> list[str]:
        lines = [_line(["quantity", "goal", *self.columns, "verdict"]), _line(["---"] * (len(self.columns) + 3))]
        for row in rows:
            values = [str(row.values[name]) if name in row.values else "–" for name in self.columns]
            lines.append(_line([row.quantity, row.goal, *values, row.verdict()]))
        return lines

    def json(self) -> str:
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=1)

    def write(self, path: Path) -> None:
        """Write the file in one step; the name's ending, .md or .json, decides the format."""
        text = self.json() if path.suffix == ".json" else self.markdown()
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def describe_environment(device: str, processor_time: bool) -> dict[str, str]:
    """Hardware, threads, clock, versions and date."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    packages = {name: _version(name) for name in ("torch", "peft", "transformers", "peft-svf")}
    threads = {} if device == "cuda" else {"threads": str(torch.get_num_threads())}
    clock = {"clock": "processor time"} if processor_time else {}
    return {"on": hardware, **threads, **clock, **packages, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def _processor() -> str:
    names = []
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
