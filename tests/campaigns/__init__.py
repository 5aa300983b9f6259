"""Campaigns of the fault hunt: many random trials of one kind, each made from a seed.
`tests/hunt.py` runs them by name."""
