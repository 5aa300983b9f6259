"""Versions of other libraries that this package was tried with."""

TESTED_TRANSFORMERS = ("5.23.0", "5.24.0")
"""Versions, in ascending order, that the bridge was tried with (`make compat`): it reaches into
parts of transformers that no release promises to keep. With another version a warning is logged
when a bridged model is loaded."""
