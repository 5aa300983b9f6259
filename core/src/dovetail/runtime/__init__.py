"""Run an engine in this process, or in a supervised process of its own."""
