"""Implement the engine loop and everything that the core runs in a step."""
