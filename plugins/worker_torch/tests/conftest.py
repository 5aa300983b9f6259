"""Long checks of the worker on a fake device are for the soak: the sampler that they try is the one of the other workers."""

import os

import pytest

IS_SOAK = bool(os.environ.get("DOVETAIL_SOAK"))
LONG = "test_draws_follow_the_distribution"


def pytest_collection_modifyitems(items):
    for item in items:
        if not IS_SOAK and getattr(item, "originalname", "") == LONG and "test_device_runner" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="make soak"))
