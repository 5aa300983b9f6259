"""The loop and everything it runs in a step."""
