"""Running the checks of a contract class on providers that are wrong on purpose."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from dovetail.testing.contract import Broken, Contract


def failures(contract: type[Contract], **attributes: Any) -> dict[str, Broken]:
    """By check: how a provider fails it."""
    found: dict[str, Broken] = {}
    test = type("Sabotaged", (contract,), attributes)()
    for name, _ in inspect.getmembers(contract, callable):
        if not name.startswith("test_"):
            continue
        test.prepare()
        try:
            getattr(test, name)()
        except pytest.skip.Exception:
            pass
        except Broken as e:
            found[name] = e
    return found
