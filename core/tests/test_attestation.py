"""Parts say by being called that they are in use, and pay for it once."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.assembly.attestation import Attestation
from dovetail.plugin.extension_points import ExtensionPoint

STEP = ExtensionPoint("s", "h", "", invoked=("plan", "run"))
ONCE = ExtensionPoint("o", "h", "", invoked=("make",), invoked_once=True)


class Part:
    calls = 0

    def plan(self, x: int) -> int:
        self.calls += 1
        return x + 1

    def make(self) -> str:
        return "made"


def test_the_first_call_counts_and_lifts_the_watch() -> None:
    attestation, part = Attestation(), Part()
    attestation.watch("a", STEP, part)
    assert attestation.invoked == {"a": False}
    assert "plan" in vars(part)
    assert part.plan(1) == 2
    assert attestation.invoked == {"a": True}
    assert "plan" not in vars(part), "later calls pay nothing"
    assert part.plan(2) == 3
    assert part.calls == 2


def test_warming_up_does_not_count_but_making_does() -> None:
    attestation, part, made = Attestation(), Part(), Part()
    attestation.watch("a", STEP, part)
    attestation.watch("b", ONCE, made)
    part.plan(1), made.make()
    attestation.begin_serving()
    assert attestation.invoked == {"a": False, "b": True}
    part.plan(1)
    assert attestation.invoked == {"a": True, "b": True}


def test_an_attribute_of_the_object_itself_comes_back() -> None:
    attestation, part = Attestation(), Part()
    own = part.plan = lambda x: x * 10  # type: ignore[method-assign]
    attestation.watch("a", STEP, part)
    assert part.plan(2) == 20
    assert part.plan is own


def test_an_error_passes_through_and_still_counts() -> None:
    class Raises:
        def plan(self) -> None:
            raise ValueError("no")

    attestation, part = Attestation(), Raises()
    attestation.watch("a", STEP, part)
    with pytest.raises(ValueError, match="no"):
        part.plan()
    assert attestation.invoked == {"a": True}


@pytest.mark.parametrize(
    "built", [None, 3, type("Slots", (), {"__slots__": (), "plan": lambda self: 1})(), lambda: 1]
)
def test_what_cannot_be_watched_is_not_claimed(built: Any) -> None:
    attestation = Attestation()
    attestation.watch("a", STEP, built)
    attestation.begin_serving()
    assert attestation.invoked == {}
