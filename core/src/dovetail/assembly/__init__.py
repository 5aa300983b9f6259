"""Build an engine from a plan."""
