"""From a plan to an engine."""
