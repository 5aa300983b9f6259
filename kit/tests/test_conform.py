"""`dovetail conform`, and the base of all contract classes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.assembly.builtins import dovetail_schedulers
from dovetail.cli.main import main
from dovetail.plugin.extension_points import EXTENSION_POINTS
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.contracts import CONTRACTS, contract_of
from dovetail_testing.plugin import install
from dovetail_testing.running import run_contracts
from dovetail_testing.scheduler import SchedulerContract

FCFS = dovetail_schedulers()[0]


def conform(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dovetail.cli.main", "conform", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120
    )


def test_a_provider_that_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "conform",
                "dovetail-core:fcfs",
                "--json",
                "--seeds",
                "2",
                "-k",
                "declaration or order",
            ]
        )
        == 0
    )
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["provider"], report["distribution"], report["extension_point"]) == (
        "fcfs",
        "dovetail-core",
        "scheduler",
    )
    assert report["passed"]
    assert {c["check"] for c in report["checks"]} == {"test_declaration", "test_declared_order"}
    assert {c["outcome"] for c in report["checks"]} == {"passed"}
    assert len({c["contract"] for c in report["checks"]}) == 2, "one for each seed"


def test_one_that_does_not_is_shown_with_its_failure(tmp_path: Path) -> None:
    """The simulated worker ignores the checkpoint, so it says other things than the reference."""
    install(tmp_path)
    out = conform(
        tmp_path,
        "dovetail-simulated:simulated",
        "-k",
        "test_greedy_is_the_references or test_the_plan_travels",
    )
    assert out.returncode == 1, out.stderr
    for text in (
        "6 failed, 1 passed",
        "the contract requires",
        "smallest failing input",
        "common causes",
        "DOVETAIL_TEST_SEED=",
    ):
        assert text in out.stdout, out.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "'nobody' is neither a provider .*fcfs.* nor a distribution .*dovetail-core"),
        (
            ["fcfs", "--option", "speed=9"],
            "options of dovetail-core:fcfs are: max_num_seqs, max_num_batched_tokens",
        ),
        (["dovetail-core", "--option", "max_num_seqs=9"], "use one of these"),
    ],
)
def test_what_cannot_be_conformed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conform", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_device_that_is_not_here_fails_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["conform", "fcfs", "--device", "tpu:7"]) == 1
    assert "device tpu:7 does not exist" in capsys.readouterr().out


def test_every_extension_point_of_the_core_has_a_contract() -> None:
    assert all(issubclass(contract_of(s) or object, Contract) for s in EXTENSION_POINTS)


def test_a_check_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="overrides test_declared_order of the contract"):
        type(
            "Cheat",
            (SchedulerContract,),
            {"provider": FCFS, "test_declared_order": lambda self: None},
        )


def test_expected_failures_are_checks_of_the_contract() -> None:
    with pytest.raises(TypeError, match="test_nothing"):
        type(
            "Typo",
            (SchedulerContract,),
            {"provider": FCFS, "expected_failures": {"test_nothing": "misspelt"}},
        )


def test_a_check_says_what_it_asks() -> None:
    with pytest.raises(TypeError, match="needs a docstring"):
        type("Mute", (Contract,), {"extension_point": "scheduler", "test_mute": lambda self: None})


def test_an_expected_failure_must_fail() -> None:
    class Small(Contract):
        extension_point = "scheduler"

        @common_causes("nothing")
        def test_always(self) -> None:
            """Nothing at all."""

    cls = type(
        "Better", (Small,), {"provider": FCFS, "expected_failures": {"test_always": "said to fail"}}
    )
    (result,) = run_contracts({"better": cls})
    assert result.outcome == "failed", "one that passes after all is a failure"


def test_every_failure_has_the_form() -> None:
    def broken(context: object, options: object) -> object:
        raise ZeroDivisionError("while it was built")

    cls = type("Broken", (SchedulerContract,), {"provider": replace(FCFS, build=broken)})
    failed = [r for r in run_contracts({"broken": cls}) if r.outcome == "failed"]
    assert failed
    for result in failed:
        assert "ZeroDivisionError: while it was built" in result.reason
        assert result.asks, result
        assert result.input, result
        assert result.causes, result


def test_what_cannot_be_built_is_a_failure_of_the_same_form() -> None:
    class Prepared(Contract):
        extension_point = "scheduler"

        def prepare(self) -> None:
            self.build()

        @common_causes("nothing")
        def test_always(self) -> None:
            """Nothing at all."""

    def broken(context: object, options: object) -> object:
        raise ImportError("no module named torch")

    cls = type("Unbuildable", (Prepared,), {"provider": replace(FCFS, build=broken)})
    (result,) = run_contracts({"unbuildable": cls})
    assert (result.outcome, result.reason) == (
        "failed",
        "the provider raised ImportError: no module named torch",
    )
    assert "`build` returns" in result.asks


def test_an_extension_point_without_a_contract_is_said_not_to_be_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(CONTRACTS, "kv_cache")
    assert main(["conform", "dovetail-core", "-k", "declaration"]) == 0
    assert (
        "not checked: dovetail-core:paged: the extension point kv_cache has no contract class"
        in capsys.readouterr().err
    )
    assert main(["conform", "paged"]) == 2
    assert "nothing can be checked" in capsys.readouterr().err
