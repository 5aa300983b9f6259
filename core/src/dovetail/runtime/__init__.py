"""An engine in this process, or in a process of its own, supervised."""
