"""A plugin of pytest that writes a failure's text as soon as it is known, also where xdist runs the tests.

python3 -m pytest -p benchmarks.at_once tests -m gpu
"""

from __future__ import annotations

import pytest


class AtOnce:
    """Writes what is reported to the process that has the terminal; workers of xdist have none."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, report)

    def write(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.terminal.write_line("")
        self.terminal.write_line(
            f"FAILED {name} ({report.when if isinstance(report, pytest.TestReport) else 'collected'})"
        )
        self.terminal.write_line(report.longreprtext)
        self.terminal.flush()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(AtOnce(terminal), "at-once")
