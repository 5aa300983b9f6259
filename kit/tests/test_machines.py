"""State machines of the kit: what fails is found, and shown as few operations with small
arguments."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from dovetail_testing.machines import Machine, beginning, operation, run_machine, shown


@dataclass(frozen=True)
class Limits:
    most: int
    note: str | None = None


class Counter(Machine):
    """Fails when it has counted past seven by two steps or more."""

    @beginning(limits=st.builds(Limits, st.integers(1, 9), st.sampled_from([None, "a"])))
    def begin(self, limits: Limits) -> None:
        self.total, self.steps = 0, 0

    @operation(by=st.integers(1, 6), words=st.lists(st.text(), min_size=1))
    def add(self, by: int, words: list[str]) -> None:
        self.total, self.steps = self.total + by, self.steps + 1

    @operation(times=st.integers(0, 3))
    def rest(self, times: int) -> None: ...

    def check(self) -> None:
        assert self.total <= 7 or self.steps < 2, f"counted to {self.total}"


class FailsAtTheEnd(Counter):
    def check(self) -> None: ...

    def end(self) -> None:
        assert self.steps == 0, f"{self.steps} steps"


class Flaky(Counter):
    runs = 0

    def check(self) -> None:
        Flaky.runs += 1
        assert Flaky.runs != 50, "once only"


def test_what_fails_is_made_small() -> None:
    for seed in range(5):
        found = run_machine(Counter, seed, examples=50, steps=30)
        assert found is not None
        error, calls = found
        assert str(error).splitlines()[0] == "counted to 8"
        assert [name for name, _ in calls] == ["begin", "add", "add"]
        assert calls[0][1] == {"limits": Limits(1, None)}
        assert sum(kwargs["by"] for _, kwargs in calls[1:]) == 8
        assert all(len(kwargs["words"]) == 1 for _, kwargs in calls[1:])
        assert shown(calls).splitlines()[1].startswith("  begin(limits=Limits(most=1, note=None))")


def test_a_failure_at_the_end_counts() -> None:
    found = run_machine(FailsAtTheEnd, 1, examples=20, steps=30)
    assert found is not None
    assert str(found[0]).splitlines()[0] == "1 steps"
    assert [name for name, _ in found[1]] == ["begin", "add"]


def test_what_fails_once_is_said_to() -> None:
    found = run_machine(Flaky, 1, examples=20, steps=30)
    assert found is not None
    assert "not when repeated" in str(found[0])


def test_what_is_right_passes() -> None:
    class Right(Counter):
        def check(self) -> None: ...

    assert run_machine(Right, 1, examples=20, steps=10) is None
