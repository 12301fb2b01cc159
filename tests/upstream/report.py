"""The table at the end of a run of PEFT's tests: what passed, failed and was skipped in each file, and why."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import pytest


OUTCOMES = ("passed", "failed", "skipped")


class Report:
    """Counts results, prints them, and fails the run if too few tests ran.

    Args:
        changes (`list[tuple[str, str]]`): What was changed around the tests: where, and what.
        minimum (`int`): How many tests must have run (passed or failed).
    """

    def __init__(self, changes: list[tuple[str, str]], minimum: int) -> None:
        self.changes = changes
        self.minimum = minimum
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.reasons[_skip_reason(report)] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures.setdefault(report.nodeid, (crash.message if crash else str(report.longrepr)).split("\n")[0])
        decides = report.failed or report.skipped or report.when == "call"
        if decides and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.ran < self.minimum:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def ran(self) -> int:
        return sum(outcome != "skipped" for outcome in self.outcomes.values())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> list[str]:
        counts = Counter((PurePosixPath(name.partition("::")[0]).stem, out) for name, out in self.outcomes.items())
        files = sorted({file for file, _ in counts})
        rows = [[file, *(str(counts[file, outcome]) for outcome in OUTCOMES)] for file in files]
        totals = Counter(self.outcomes.values())
        rows.append(["total", *(str(totals[outcome]) for outcome in OUTCOMES)])
        lines = ["", "PEFT's own tests with SVF", *_table(["file", *OUTCOMES], rows)]
        lines += ["", "Skipped, and why", *_table(["tests", "reason"], _by_count(self.reasons))]
        lines += ["", "Changed around the tests", *_table(["where", "what"], [list(row) for row in self.changes])]
        if self.failures:
            lines += ["", "Failed, and why", *(f"{test}\n    {error}" for test, error in self.failures.items())]
        if self.ran < self.minimum:
            lines += ["", f"FAILED: only {self.ran} tests ran, at least {self.minimum} must"]
        return lines


def _skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def _by_count(counter: Counter[str]) -> list[list[str]]:
    return [[str(count), reason] for reason, count in counter.most_common()]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return [line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]]]
