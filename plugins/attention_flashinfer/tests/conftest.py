"""Fixtures of this plugin's tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread, because with tiny steps on a busy machine two threads mostly wait for each
    other."""
    torch.set_num_threads(1)
