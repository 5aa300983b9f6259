"""Provide the simulated worker's plugin and a model for it."""

from dovetail_testing.fixtures import model, simulated

__all__ = ["model", "simulated"]
