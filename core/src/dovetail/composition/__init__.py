"""Resolve an engine config to an engine plan."""
