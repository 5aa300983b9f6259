"""Fixtures of this plugin's tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny steps on a busy machine: two threads would mostly wait for each other."""
    torch.set_num_threads(1)
