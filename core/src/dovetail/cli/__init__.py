"""Implement the `dovetail` command."""
