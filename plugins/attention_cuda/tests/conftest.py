"""Select Triton's interpreter, before any kernel is imported, and mark long checks as `soak`."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
FEW = 10
"""Number of random steps that are not marked as `soak`."""
LONG = {
    "TestCuda": {"test_every_declared_size_and_type", "test_deterministic"},
    "TestTriton": {"test_deterministic"},
}


def pytest_collection_modifyitems(items):
    for item in items:
        where, name = getattr(item.cls, "__name__", ""), getattr(item, "originalname", "")
        is_late = name == "test_random_step" and item.callspec.params["index"] >= FEW
        if where in LONG and (is_late or name in LONG[where]):
            item.add_marker(pytest.mark.soak)
