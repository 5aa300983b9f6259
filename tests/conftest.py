"""Fixtures for tests across packages."""

import pytest
import torch
from checkpoints import checkpoint

__all__ = ["checkpoint"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models on a busy machine: two threads would mostly wait for each other."""
    torch.set_num_threads(1)
