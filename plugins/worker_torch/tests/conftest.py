"""Long checks of the worker on a fake device are for the soak: the sampler that they try is the one
of the other workers."""

import pytest

LONG = "test_draws_follow_the_distribution"


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", "") == LONG and "test_device_runner" in item.nodeid:
            item.add_marker(pytest.mark.soak)
