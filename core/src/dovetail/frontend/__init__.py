"""Convert between text and token ids. This package runs in the front-end only."""
