"""State machines whose failures are small: hypothesis finds a sequence of operations that fails,
and this file shortens it by running it again with less, which for sequences of operations goes
further than shrinking the choices behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import SearchStrategy

MAX_REPLAYS = 400
Method = TypeVar("Method", bound=Callable[..., None])
Call = tuple[str, dict[str, Any]]


class Machine(RuleBasedStateMachine):
    """Operations are methods with `@operation` or, for the first, `@beginning`. A subclass checks
    itself in `check`, which is called after each, and in `end`, at the end of all; both only once
    it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.is_sound = False
        """It has begun, and nothing has failed: once something has, what follows says nothing."""

    def check(self) -> None: ...

    def end(self) -> None: ...

    @invariant()
    def check_if_sound(self) -> None:
        if self.is_sound:
            self.is_sound = False
            self.check()
            self.is_sound = True

    def teardown(self) -> None:
        if self.is_sound:
            self.end()


def operation(**strategies: SearchStrategy[Any]) -> Callable[[Method], Method]:
    return _recorded(rule, strategies)


def beginning(**strategies: SearchStrategy[Any]) -> Callable[[Method], Method]:
    return _recorded(initialize, strategies)


def _recorded(
    kind: Callable[..., Any], strategies: dict[str, SearchStrategy[Any]]
) -> Callable[[Method], Method]:
    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def recorded(self: Machine, **kwargs: Any) -> None:
            self.calls.append((method.__name__, kwargs))
            self.is_sound = False
            method(self, **kwargs)
            self.is_sound = True

        return kind(**strategies)(recorded)  # type: ignore[no-any-return]

    return decorate


def run_machine(
    new: Callable[[], Machine], run_seed: int, *, examples: int, steps: int
) -> tuple[Exception, list[Call]] | None:
    """Run random sequences of operations; returns the error of one that fails, and the operations,
    as few as can be."""
    failed: list[Machine] = []

    def begin() -> Machine:
        failed[:] = [new()]
        return failed[0]

    factory: Any = seed(run_seed)(begin)  # a factory will do, though typed as a class
    state = random.getstate()
    try:
        run_state_machine_as_test(
            factory, settings=limits(examples, phases=(Phase.generate,), stateful_step_count=steps)
        )
    except Flaky as e:
        return (
            AssertionError(f"the same operations failed once, and not when repeated: {e}"),
            failed[0].calls,
        )
    except Exception as e:
        return shortest(new, failed[0].calls, e)
    finally:
        random.setstate(state)
    return None


def limits(examples: int, **more: Any) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **more,
    )


def replay(new: Callable[[], Machine], calls: list[Call]) -> Exception | None:
    """Run these operations on a new machine; returns how they fail."""
    machine = new()
    try:
        try:
            for name, kwargs in calls:
                getattr(machine, name)(**kwargs)
                machine.check_if_sound()
        finally:
            machine.teardown()
    except Exception as e:
        return e
    return None


def shortest(
    new: Callable[[], Machine], calls: list[Call], error: Exception
) -> tuple[Exception, list[Call]]:
    """Leave out operations, then make their arguments smaller, as long as it still fails. The
    beginning stays."""
    num_replays = 0

    def still_fails(fewer: list[Call]) -> bool:
        nonlocal calls, error, num_replays
        num_replays += 1
        found = replay(new, fewer) if num_replays <= MAX_REPLAYS else None
        if found is not None:
            calls, error = fewer, found
        return found is not None

    before: list[Call] = []
    while calls != before:
        before, length = calls, len(calls) // 2
        while length:
            for i in range(len(calls) - length, 0, -length):
                still_fails(calls[:i] + calls[i + length :])
            length //= 2
        for i in range(len(calls)):
            name = calls[i][0]
            for key in calls[i][1]:
                while any(
                    still_fails([*calls[:i], (name, {**calls[i][1], key: value}), *calls[i + 1 :]])
                    for value in _smaller(calls[i][1][key])
                ):
                    pass
    return error, calls


def _smaller(value: Any) -> Iterator[Any]:
    """Values that are valid wherever this one is: nothing here goes below 1, or leaves a list
    empty."""
    if value is True:
        yield False
    elif isinstance(value, int) and value > 1:
        yield from dict.fromkeys((1, value // 2, value - 1))
    elif isinstance(value, list) and len(value) > 1:
        yield from (value[: len(value) // 2], value[:-1])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            own = getattr(value, f.name)
            simple = [f.default] if f.default in (None, 0) and own != f.default else []
            yield from (
                dataclasses.replace(value, **{f.name: v}) for v in (*simple, *_smaller(own))
            )


def shown(calls: list[Call]) -> str:
    lines = [
        f"{name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})" for name, kwargs in calls
    ]
    return "\n".join(["", *(f"  {line}" for line in lines)])
