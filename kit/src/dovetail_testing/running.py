"""Run contract classes with pytest but without a test file, for `dovetail conform` and the kit's
own tests."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from dovetail_testing.contract import Broken, Contract

Outcome = Literal["passed", "failed", "not declared", "expected failure"]


@dataclass(frozen=True)
class CheckResult:
    """Result of one check, or of one of its parameters. The last fields are empty unless it
    failed."""

    contract: str
    """Label of the contract class in the run."""
    check: str
    parameter: str
    outcome: Outcome
    seconds: float
    reason: str = ""
    asks: str = ""
    input: str = ""
    causes: str = ""
    seed: int = 0


def run_contracts(
    contracts: Mapping[str, type[Contract]],
    *,
    keyword: str = "",
    stop_at_first: bool = False,
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the checks of these classes, by label, in this process; call `on_result` after each.

    `stop_at_first` skips the rest of a class after its first failed check.
    """
    runner = _Runner(contracts, stop_at_first, on_result)
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file, settings = Path(folder, "conformance.py"), Path(folder, "pytest.ini")
        file.touch()
        settings.write_text("[pytest]\n")
        arguments = [
            str(file),
            "-c",
            str(settings),
            "--rootdir",
            folder,
            "-p",
            "no:cacheprovider",
            "-q",
            "-W",
            "ignore",
            "--assert=plain",
        ]
        with contextlib.redirect_stdout(output):
            status = pytest.main(arguments + (["-k", keyword] if keyword else []), plugins=[runner])
    if (
        status
        not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
        or runner.broken
    ):
        raise RuntimeError(f"the checks could not be run:\n{output.getvalue()}")
    return runner.results


@dataclass
class _Runner:
    """A pytest plugin that replaces the contents of the test file by the classes, and records the
    result of each check."""

    contracts: Mapping[str, type[Contract]]
    stop_at_first: bool
    on_result: Callable[[CheckResult], None]
    results: list[CheckResult] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    broken: bool = False

    def pytest_pycollect_makemodule(self, module_path: Path, parent: Any) -> pytest.Module:
        contents = ModuleType("conformance")
        for i, (label, contract) in enumerate(self.contracts.items()):
            name = f"Test{i}"
            setattr(contents, name, contract)
            self.labels[name] = label
        module: pytest.Module = pytest.Module.from_parent(parent, path=module_path)
        module.obj = contents
        return module

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.broken = self.broken or report.failed

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.stop_at_first and _class_of(item) in self.failed:
            pytest.skip(_NOT_RUN)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        ended = report.when == "call" or report.outcome != "passed"
        error = call.excinfo.value if call.excinfo else None
        if ended and _NOT_RUN not in str(error):
            result = self._result(item, report, error)
            self.results.append(result)
            if result.outcome == "failed":
                self.failed.add(_class_of(item))
            self.on_result(result)
        return report

    def _result(
        self, item: pytest.Item, report: pytest.TestReport, error: BaseException | None
    ) -> CheckResult:
        label, check = self.labels[_class_of(item)], getattr(item, "originalname", item.name)
        at = (label, check, item.name.removeprefix(check).strip("[]"))
        if report.passed:
            return CheckResult(*at, "passed", report.duration)
        if report.skipped:
            outcome: Outcome = "expected failure" if hasattr(report, "wasxfail") else "not declared"
            return CheckResult(
                *at, outcome, report.duration, str(getattr(report, "wasxfail", error))
            )
        if isinstance(error, Broken):
            return CheckResult(
                *at,
                "failed",
                report.duration,
                error.found,
                error.asks,
                error.input.strip(),
                error.causes,
                error.seed,
            )
        return CheckResult(
            *at, "failed", report.duration, f"{report.when}: {type(error).__name__}: {error}"
        )


_NOT_RUN = "another check of the class has failed"


def _class_of(item: pytest.Item) -> str:
    assert item.parent is not None
    return item.parent.name
