"""Run state machines and reduce their failures. Hypothesis finds a failing sequence of operations,
and this module shortens it by replaying parts of it, which reduces sequences of operations further
than shrinking the underlying choices.
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
    """Base of state machines. Operations are methods with `@operation` or, for the first one,
    `@beginning`. A subclass checks its state in `check`, which is called after each operation, and
    in `end`, which is called at the end; both only after the first operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.is_sound = False
        """True after the first operation until something fails; later results mean nothing then."""

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
    """Run random sequences of operations. Returns the error of a failing one and its operations,
    reduced as far as possible."""
    failed: list[Machine] = []

    def begin() -> Machine:
        failed[:] = [new()]
        return failed[0]

    factory: Any = seed(run_seed)(begin)  # typed as a class, but a factory works
    state = random.getstate()
    try:
        run_state_machine_as_test(
            factory, settings=limits(examples, phases=(Phase.generate,), stateful_step_count=steps)
        )
    except Flaky as e:
        return (
            AssertionError(f"the same operations failed once, but not when repeated: {e}"),
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
    """Run the operations on a new machine and return the exception, if there is one."""
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
    """Leave out operations, then reduce their arguments, as long as the failure persists. The first
    operation stays."""
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
    """Yield smaller values that are valid wherever this one is: no number falls below 1, and no
    list becomes empty."""
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
